"""Latent attention of width 128 on FineWeb-Edu, the reciprocal term off; all else is vanilla_baseline. 6.55e9 tokens."""
out_dir = 'out/ra_mla_baseline'
dataset = 'fineweb_edu'
dtype = 'bfloat16'
compile = True
attention = 'mla'
latent_dim = 128  # the cache is 6 times smaller: 2 x 128 numbers a token and layer against 2 x 768
per_head_q_latent = True
per_head_v_up = True
ra_alpha = 0.0  # off; with --ra_learned=True each head learns its own
ra_window = 64
