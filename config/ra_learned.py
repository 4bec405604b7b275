"""Reciprocal attention, a weight a head learned from 0; all else is vanilla_baseline."""
out_dir = 'out/ra_learned'
dataset = 'fineweb_edu'
dtype = 'bfloat16'
ra_learned = True
ra_window = 64  # tokens back
