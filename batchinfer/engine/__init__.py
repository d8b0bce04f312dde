"""The native engine: never imports data/ or backends/, usable alone as batchinfer.Engine."""
