# a small GPT on Shakespeare's characters, in about a minute on two CPU cores
# $ python data/shakespeare_char/prepare.py
# $ python train.py config/train_shakespeare_char_cpu.py
out_dir = 'out-shakespeare-char-cpu'
dataset = 'shakespeare_char'
eval_interval, eval_iters, log_interval = 250, 10, 10
batch_size, gradient_accumulation_steps, block_size = 16, 1, 128
n_layer, n_head, n_embd = 2, 4, 128 # in one minute, more iterations help more than more layers
optimizer = 'muon' # learned more per iteration here than AdamW, in a little more time
muon_learning_rate, learning_rate, min_lr = 0.04, 5e-3, 5e-4
max_iters, warmup_iters = 950, 65
beta2 = 0.99 # larger, since an iteration has few tokens
