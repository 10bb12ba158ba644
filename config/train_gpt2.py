# train GPT-2 small (124M parameters) from scratch on OpenWebText, on 8 GPUs
# with its train.bin and val.bin in data/openwebtext, which nanoGPT's prepare.py also writes
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
out_dir = 'out-train-gpt2'
dataset = 'openwebtext'
batch_size, gradient_accumulation_steps = 12, 40 # 491,520 tokens an iteration
max_iters = 600000 # 300 billion tokens
eval_interval, eval_iters, log_interval = 1000, 200, 10
