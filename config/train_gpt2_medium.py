# train GPT-2 medium (355M parameters) from scratch on OpenWebText, on 8 GPUs
# needs train.bin and val.bin in data/openwebtext, such as nanoGPT's prepare.py writes
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_medium.py
out_dir = 'out-train-gpt2-medium'
n_layer, n_head, n_embd = 24, 16, 1024
batch_size, gradient_accumulation_steps = 6, 80 # 491,520 tokens an iteration
learning_rate, min_lr = 3e-4, 3e-5
eval_interval, log_interval = 1000, 10
