"""
What a run writes for people and for plots: log.csv, a row an iteration, and config.json, its settings.
"""
import csv
import json
import os
import statistics

COLUMNS = 'iter,epoch,loss,lr,grad_norm,time_ms,tokens_per_sec,mfu,memory_mb,train_loss,val_loss'.split(',')

def start_log(out_dir: str, settings: dict, resume_at: int | None = None) -> None:
    """ make out_dir, its config.json, and log.csv with the rows of the iterations before `resume_at` """
    path = os.path.join(out_dir, 'log.csv')
    try:
        os.makedirs(out_dir, exist_ok=True)
        rows = []
        if resume_at is not None and os.path.exists(path):
            with open(path, newline='') as file:
                rows = [row for row in csv.DictReader(file) if row['iter'] and int(row['iter']) < resume_at]
            if rows and list(rows[0]) != COLUMNS:
                raise ValueError('other columns')
        with open(path + '.tmp', 'w', newline='') as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(path + '.tmp', path)
        with open(os.path.join(out_dir, 'config.json'), 'w') as file:
            json.dump(settings, file, indent=2)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is no log of train.py ({error}); move it away and type this again") from None
    except OSError as error:
        raise OSError(f"cannot write to {out_dir} ({error.strerror}); type --out_dir=ANOTHER") from None

def append_row(out_dir: str, row: dict) -> None:
    """ add a row to log.csv, with empty cells for what was not measured """
    with open(os.path.join(out_dir, 'log.csv'), 'a', newline='') as file:
        csv.DictWriter(file, COLUMNS).writerow({k: repr(v) for k, v in row.items() if v is not None})

def epoch_times(out_dir: str, config: dict) -> dict[str, float]:
    """ {plan: seconds an epoch} of out_dir's run, empty where there is none of this model and data """
    alike = ('init_from', 'dataset', 'block_size', 'batch_size', 'gradient_accumulation_steps', 'n_layer',
             'n_head', 'n_embd', 'device', 'dtype')
    try:
        with open(os.path.join(out_dir, 'config.json')) as file:
            settings = json.load(file)
        with open(os.path.join(out_dir, 'log.csv'), newline='') as file:
            rows = [row for row in csv.DictReader(file) if row['time_ms']]
        if any(settings[key] != config[key] and config[key] not in ('auto', 'resume') for key in alike):
            return {}
        iters, epochs = (float(rows[-1][key]) - float(rows[0][key]) for key in ('iter', 'epoch'))
        iteration = statistics.median(float(row['time_ms']) for row in rows) / 1000
        return {settings['plan']: iteration * iters / epochs}
    except (OSError, ValueError, KeyError, IndexError, ZeroDivisionError): # no run, or another program's
        return {}
