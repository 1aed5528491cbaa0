"""What `benchmarks/gpu_check.py` measures, one guarded call at a time.

plan.py          the list, in order
operations.py, training_round.py: what each measures;  peers.py: what it competes with
clock.py         medians by device events, the host kept ahead
machine.py       what a small model of the machine predicts
worker.py        runs measurements in a process that may crash or hang, and replaces it
record.py        the JSON, written after every result, and its Markdown
"""
