# a small GPT on Shakespeare's characters, nanoGPT's recipe for a GPU
# $ python data/shakespeare_char/prepare.py
# $ python train.py config/train_shakespeare_char.py
out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
eval_interval = 250 # it overfits in the end, but ckpt.pt keeps the best
log_interval = 10
batch_size = 64
gradient_accumulation_steps = 1
block_size = 256
n_layer, n_head, n_embd, dropout = 6, 6, 384, 0.2
learning_rate, min_lr, warmup_iters = 1e-3, 1e-4, 100
max_iters = 5000
beta2 = 0.99 # larger, since an iteration has few tokens
