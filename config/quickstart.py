# a first model, of Python's own documentation, in two minutes on two CPU cores
# $ make quickstart
out_dir = 'out-quickstart'
dataset = 'quickstart'
eval_interval = 100
eval_iters = 20
log_interval = 10
batch_size = 16
gradient_accumulation_steps = 1
block_size = 128
n_layer, n_head, n_embd = 4, 4, 128
optimizer = 'muon' # learns about twice as much from an iteration as AdamW
learning_rate, muon_learning_rate, min_lr, warmup_iters = 3e-3, 0.02, 3e-4, 50
max_iters = 700
beta2 = 0.99 # an iteration has few tokens
