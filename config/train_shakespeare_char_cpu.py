# a small GPT on Shakespeare's characters, in a minute or two on two CPU cores
# $ python data/shakespeare_char/prepare.py
# $ python train.py config/train_shakespeare_char_cpu.py
out_dir = 'out-shakespeare-char-cpu'
dataset = 'shakespeare_char'
eval_interval = 250
eval_iters = 20
log_interval = 10
batch_size = 16
gradient_accumulation_steps = 1
block_size = 128
n_layer, n_head, n_embd = 4, 4, 128
optimizer = 'muon' # learns about twice as much from an iteration as AdamW
learning_rate, muon_learning_rate, min_lr, warmup_iters = 3e-3, 0.02, 3e-4, 100
max_iters = 1000
beta2 = 0.99 # an iteration has few tokens
