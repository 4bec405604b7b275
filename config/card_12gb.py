"""vanilla_baseline for a card of 12 GB, at full speed.

An H200 whose process was capped at 11.0 GiB reserved 9.89 GiB, pruning included; CUDA and its
libraries took 0.75 GiB beside. It has not run on a card of 12 GB.
"""
out_dir = 'out/card_12gb'
dataset = 'fineweb_edu'
dtype = 'bfloat16'
loss_chunk_tokens = 4096  # 0.3 GiB less than with the default
