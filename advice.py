"""
What a run makes of a dataset just prepared, and what to type for it; other options for little text.
"""
import os

from configurator import ROOT, quote, run_file

LITTLE = 100_000 # tokens to train on

def options_of(config):
    """ train.py's options as `config` sets them """
    with open(os.path.join(ROOT, 'train.py'), encoding='utf-8') as file:
        options = {}
        exec(file.read().partition('from configurator')[0], options)
    return options | run_file(os.path.join(ROOT, config), options)

def fit_block(options, n_train, n_val):
    """ {'block_size': N} where the config's sequences are too long for so few tokens """
    block_size = options['block_size']
    while block_size > 1 and (block_size >= n_val or 8 * block_size > n_train):
        block_size //= 2
    return {'block_size': block_size} if block_size < options['block_size'] else {}

def little_run(options, n_train):
    """ what suits little text: an iteration of few sequences, and two evaluations an epoch """
    if options['init_from'] == 'scratch': # which wants all of its iterations
        return {'eval_interval': 50, 'patience': 4}
    return {'lora_rank': 8, 'learning_rate': '3e-4', 'batch_size': 4, 'gradient_accumulation_steps': 1,
            'num_epochs': 10, 'eval_interval': max(1, n_train // (2 * 4 * options['block_size'])),
            'patience': 4}

def count_epochs(options, n_train):
    """ what a run makes of so many tokens, in words, by train.py's arithmetic """
    windows = -(-(n_train - 1) // options['block_size'])
    sequences = options['batch_size'] * options['gradient_accumulation_steps']
    iters = options['max_iters']
    if options['num_epochs']:
        iters = min(iters, max(1, round(options['num_epochs'] * windows / sequences)))
    return (f"{iters * sequences / windows:,.1f} epochs of them, in {iters:,} iterations of "
            f"{sequences * options['block_size']:,} tokens")

def tell_run(config, name, n_train, n_val):
    """ say what a run with `config` makes of so many tokens, and the command for it, with what suits them """
    options = options_of(config)
    fitting = fit_block(options, n_train, n_val)
    options |= fitting
    with_block = f" with --block_size={options['block_size']}" if fitting else ''
    print(f"a default run of {config}{with_block} makes {count_epochs(options, n_train)}")
    if fitting:
        print(f"warning: {n_val:,} tokens to validate on say little of how good a model is, and make "
              "sequences short; add text, or type a larger --val_fraction")
    if n_train < LITTLE:
        fitting |= little_run(options, n_train)
        print("warning: that is little, and a model soon knows it by heart; the command below makes at most "
              f"{count_epochs(options | fitting, n_train)}, and ends after {fitting['patience']} evaluations "
              "without a better one")
    more = ''.join(f' --{key}={value}' for key, value in fitting.items())
    print(f"next: python train.py {config} --dataset={quote(name)} --out_dir={quote(f'out-{name}')}{more}")
