"""Latent attention of width 128, the reciprocal term off; all else is vanilla_baseline."""
out_dir = 'out/ra_mla_baseline'
dataset = 'fineweb_edu'
dtype = 'bfloat16'
attention = 'mla'
latent_dim = 128  # a sixth of the cache: 2 x 128 numbers a token and layer against 2 x 768
ra_alpha = 0.0  # off; with --ra_learned=True each head learns its own
