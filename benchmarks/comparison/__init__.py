"""What `make bench` is made of: the operations, the round and decoding beside what else does the same.

machine.py     the machine's description, without host names or paths
record.py      the JSON of a run: samples, errors, peaks, what was missing, bars
batch.py       the tokens, head and advantages that all sides are given; their gradients in float64
peers.py       the sides: what an operation competes with, and the limit that it cannot pass
logit_rows.py  the same of operations on logits that exist: rows, draws, filters
fresh.py       one side in a process of its own: its peak memory
models.py      the models whose rounds and decoding are measured
decoders.py    decoding in processes of their own, one for each side, which take turns
gguf_model.py  the same model as llama.cpp reads it
curves.py      the scaling curves as SVG
"""
