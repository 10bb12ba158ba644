# a small GPT on Shakespeare's characters, in a minute or two on two CPU cores
# $ python data/shakespeare_char/prepare.py
# $ python train.py config/train_shakespeare_char_cpu.py
out_dir = 'out-shakespeare-char-cpu'
dataset = 'shakespeare_char'
eval_interval, eval_iters, log_interval = 250, 10, 10
batch_size, gradient_accumulation_steps, block_size = 16, 1, 128
n_layer, n_head, n_embd = 4, 4, 128
optimizer = 'muon' # gets far more out of an iteration than AdamW, in a little more time
muon_learning_rate, learning_rate, min_lr = 0.02, 3e-3, 3e-4
max_iters, warmup_iters = 750, 100
beta2 = 0.99 # an iteration has few tokens
