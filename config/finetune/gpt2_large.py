# finetune GPT-2 large (774M parameters) on Shakespeare, on one device
# $ python data/shakespeare/prepare.py
# $ python train.py config/finetune/gpt2_large.py
init_from = 'gpt2-large'
out_dir = 'out-gpt2-large'
dataset = 'shakespeare' # or your own, made by data/custom/prepare.py: --dataset=NAME
batch_size, gradient_accumulation_steps = 16, 1 # 16 sequences of 1024 tokens an iteration
num_epochs = 5.0 # 92 iterations on this text; larger models overfit in fewer
eval_interval, eval_iters = 10, 0 # the whole validation split
learning_rate, min_lr = 3e-5, 3e-6 # small, to move pretrained weights gently
warmup_iters = 100 # or a tenth of the run, if that is less
dropout = 0.1
