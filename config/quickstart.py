# a first model, trained on Python's own documentation in two or three minutes on two CPU cores
# $ make quickstart
out_dir = 'out-quickstart'
dataset = 'quickstart'
eval_interval, eval_iters, log_interval = 100, 20, 20
batch_size, gradient_accumulation_steps, block_size = 16, 1, 128
n_layer, n_head, n_embd = 4, 4, 128
optimizer = 'muon' # learned more per iteration here than AdamW, in a little more time
learning_rate, min_lr = 3e-3, 3e-4
max_iters, warmup_iters = 800, 100
beta2 = 0.99 # larger, since an iteration has few tokens
