"""The same request on a real GPU: a model of random weights is built there, the request runs, and memory is read.

`build.py`: the model; `inference.py` and `training.py`: what runs; `meter.py`: what is read, and when; `run.py`: one
measurement from end to end. The rules are those that the cases of fixtures/measured were measured by. All but the
reading of memory runs on any device, and is tested on the CPU.
"""
