"""
What a run does with a dataset just prepared, the command to type, and better options for little text.
"""
import os

from configurator import ROOT, quote, read_options, run_file, script
from dataset import Split, find_dataset

LITTLE, SOME, MUCH = 10**5, 10**6, 10**8 # tokens to train on

def options_of(config):
    """ train.py's options as `config` sets them """
    options = {name: default for _, name, default, _ in read_options(os.path.join(ROOT, 'train.py'))[1]}
    return options | run_file(os.path.join(ROOT, config), options)

def fit_block(options, n_train, n_val, longest):
    """ {'block_size': N} if the config's sequences are too long for so few tokens, else {}; it does not cut
    items, of which the longest has so many tokens """
    block_size = options['block_size']
    while block_size > 1 and (8 * block_size > n_train or block_size >= n_val and not longest):
        if block_size // 2 < longest:
            break
        block_size //= 2
    return {'block_size': block_size} if block_size < options['block_size'] else {}

def suiting(options, n_train, windows=0):
    """ options that suit so much text, as in docs/finetuning-quickstart.md: fewer sequences per iteration, or
    fewer epochs, and a few evaluations per epoch, which has so many windows, if they are not full """
    if options['init_from'] == 'scratch': # needs all of its iterations
        return {'eval_interval': 50, 'patience': 4} if n_train < LITTLE else {}
    adapter = {'lora_rank': 8, 'learning_rate': '3e-4'} if n_train < LITTLE else {}
    sequences, steps, epochs, evaluations, end = (
        (4, 1, 10, 2, {'patience': 4}) if n_train < LITTLE
        else (8, 2, 5, 2, {'patience': 4}) if n_train < SOME
        else (8, 8, 3, 2, {'patience': 3}) if n_train < MUCH
        else (8, 8, 1, 10, {'eval_iters': 200})) # the whole of such a val split would take long
    interval = max(1, (windows or n_train // options['block_size']) // (evaluations * sequences * steps))
    return {**adapter, 'batch_size': sequences, 'gradient_accumulation_steps': steps, 'num_epochs': epochs,
            'eval_interval': interval, **end}

def count_windows(options, name):
    return Split(find_dataset(name), 'train', options['block_size'], 2**16).n_windows

def count_epochs(options, name):
    """ how many epochs and iterations a run makes, in words, by train.py's arithmetic """
    windows = count_windows(options, name)
    sequences = options['batch_size'] * options['gradient_accumulation_steps']
    iters = options['max_iters']
    if options['num_epochs']:
        iters = round(min(iters, max(1, options['num_epochs'] * windows / sequences)))
    several = 's' if iters > 1 else ''
    return (f"{iters * sequences / windows:,.1f} epochs of them, in {iters:,} iteration{several} of "
            f"{sequences * options['block_size']:,} tokens")

def tell_run(config, name, n_train, n_val, longest=0):
    """ print what a run with `config` makes of so many tokens, in items of which the longest has `longest` if
    they are items, and a command with options that suit them """
    options = options_of(config)
    fitting = fit_block(options, n_train, n_val, longest)
    options |= fitting
    with_block = f" with --block_size={options['block_size']}" if fitting else ''
    print(f"a default run of {config}{with_block} makes {count_epochs(options, name)}")
    if fitting:
        print(f"warning: {n_train:,} tokens to train on and {n_val:,} to validate on are few, and their loss "
              "says little; add text, or validate on another share of it")
    suits = suiting(options, n_train, count_windows(options, name) if longest else 0)
    fitting |= suits
    if suits:
        little = "warning: a model soon knows so little text by heart; " if n_train < LITTLE else ''
        makes = [f"makes at most {count_epochs(options | fitting, name)}"] if 'num_epochs' in suits else []
        if 'patience' in suits:
            makes.append(f"ends after {suits['patience']} evaluations without a better one")
        print(f"{little}the command below {', and '.join(makes)}")
    more = ''.join(f' --{key}={value}' for key, value in fitting.items())
    print(f"next: python {script('train.py')} {config} --dataset={quote(name)} "
          f"--out_dir={quote(f'out-{name}')}{more}")
