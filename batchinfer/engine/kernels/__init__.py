"""One module an operation: its contract, a torch reference, and the fast implementations beside it."""
