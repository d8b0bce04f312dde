"""NVIDIA's TensorRT-LLM behind the door. Its package is never imported by the process that reads and writes the data.

versions.py    what each version has and calls by which name
arguments.py   a job in the words of its ``LLM(...)`` and ``SamplingParams(...)``
backend.py     requests in flight, on one event loop
plan.py        a built engine on disk, and whether it belongs here
build.py       the build; make.py is the process that it runs NVIDIA's tools in
"""
