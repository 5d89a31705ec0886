"""What `bench/gpu.py` runs on a card, one module for each section.

`supervisor` starts `worker` processes and stops those that hang, `sections` lists what they run, `report` is what comes
back. Sections are generators: what they have yielded survives when a kernel faults or time runs out.
"""
