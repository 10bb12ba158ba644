# train GPT-2 large (774M parameters) from scratch on OpenWebText, on 8 GPUs
# needs train.bin and val.bin in data/openwebtext, such as nanoGPT's prepare.py writes
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_large.py
out_dir = 'out-train-gpt2-large'
n_layer, n_head, n_embd = 36, 20, 1280
batch_size, gradient_accumulation_steps = 4, 120 # 491,520 tokens an iteration
learning_rate, min_lr = 2.5e-4, 2.5e-5
eval_interval, log_interval = 1000, 10
