# finetune GPT-2 small (124M parameters) on Shakespeare, on one device
# $ python data/shakespeare/prepare.py
# $ python train.py config/finetune/gpt2_small.py
init_from = 'gpt2'
out_dir = 'out-gpt2-small'
dataset = 'shakespeare' # or your own, made by data/custom/prepare.py: --dataset=NAME
batch_size, gradient_accumulation_steps = 8, 8 # 64 sequences of 1024 tokens an iteration
num_epochs = 20.0 # 92 iterations on this text; larger models overfit in fewer
eval_interval, eval_iters = 10, 0 # the whole validation split
learning_rate, min_lr = 3e-5, 3e-6 # small, to move pretrained weights gently
warmup_iters = 100 # or a tenth of the run, if that is less
dropout = 0.1
