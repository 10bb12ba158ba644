"""
Writes what a run leaves for people and plots: log.csv, a row per logged iteration; config.json, its settings;
samples.txt; and report.md, the whole run on one page. On request, wandb gets the rows and settings, too.
"""
import contextlib
import csv
import datetime
import io
import json
import math
import os
import re
import statistics
import sys
import time
from dataclasses import dataclass, replace

from checkpoint import DEFAULTS
from configurator import quote, script
from plot import plot_run
from saver import cannot_write, replacing

COLUMNS = 'iter,epoch,loss,lr,grad_norm,time_ms,tokens_per_sec,mfu,memory_mb,train_loss,val_loss'.split(',')
RULE = '-' * 40 + ' ' # between two samples

@dataclass
class Best:
    """ the lowest validation loss so far; a checkpoint holds these fields """
    best_val_loss: float = math.inf
    best_iter: int = 0
    n_worse: int = 0 # evaluations since the best
    evaluated: int = -1 # the iteration of the latest evaluation
    lost: float = math.inf # the lowest loss of a model that could not be saved

    @classmethod
    def of(cls, checkpoint: dict) -> 'Best':
        """ read it from a checkpoint of ours, or of nanoGPT's, which has only the loss, as a tensor """
        iter_num = checkpoint.get('iter_num', 0)
        return cls(float(checkpoint.get('best_val_loss', math.inf)), checkpoint.get('best_iter', iter_num),
                   checkpoint.get('n_worse', 0), checkpoint.get('evaluated', -1),
                   checkpoint.get('lost', math.inf))

    def after(self, iter_num: int, val_loss: float) -> tuple['Best', bool]:
        """ the Best after one more evaluation, and whether that one is the best; an evaluation that a resumed
        run repeats counts once """
        # a resumed run may repeat the best: it may have died between saving last.pt and ckpt.pt
        is_best = val_loss < self.best_val_loss or (iter_num == self.best_iter
                                                    and self.best_val_loss < math.inf)
        n_worse = 0 if is_best else self.n_worse + (iter_num > self.evaluated)
        loss, best_iter = (val_loss, iter_num) if is_best else (self.best_val_loss, self.best_iter)
        return Best(loss, best_iter, n_worse, max(iter_num, self.evaluated), self.lost), is_best

    def without(self, before: 'Best') -> 'Best':
        """ the same counts, but the best as it was before, since the latest could not be saved """
        return replace(self, best_val_loss=before.best_val_loss, best_iter=before.best_iter,
                       lost=min(before.lost, self.best_val_loss))

    def describe(self, out_dir: str, iter_num: int, max_iters: int, ended: bool, asked: bool = False) -> str:
        """ a summary for the end of a run, or of a part of it, and what to type next; `asked` says that the
        model was trained on instructions """
        waited = ended and iter_num < max_iters # as long as patience allows
        learned = max(self.evaluated, self.best_iter) > 0 or not iter_num # ckpt.pt may hold what it learned
        path = quote(out_dir if learned else os.path.join(out_dir, 'last.pt'))
        following = f"next: python {script('sample.py')} --out_dir={path}"
        following += ' --instruction=TEXT' if asked else ''
        if waited or not ended:
            launch = 'python' if os.environ.get('WORLD_SIZE', '1') == '1' else 'torchrun ...'
            following += (f"\nto go on: {launch} {script('train.py')} --init_from=resume "
                          f"--out_dir={quote(out_dir)}{' --patience=0' if waited else ''}")
        best, latest = (os.path.join(out_dir, name) for name in ('ckpt.pt', 'last.pt'))
        if self.best_val_loss == math.inf:
            return f"no evaluation has a checkpoint yet; the latest is {latest}\n{following}"
        lines = [f"best val loss {self.best_val_loss:.4f}, at iteration {self.best_iter}: {best}; "
                 f"the latest model: {latest}"]
        if waited:
            several = f"{self.n_worse} evaluations in a row were" if self.n_worse > 1 else "1 evaluation was"
            lines.insert(0, f"{several} no better than that of iteration {self.best_iter}, so it ended")
        if not learned:
            lines.append("nothing was evaluated since iteration 0: what was learned is in last.pt alone")
        elif self.lost < self.best_val_loss:
            lines.append(f"a better model, of val loss {self.lost:.4f}, could not be saved as {best}")
        elif self.best_iter == 0 and iter_num:
            lines.append("no evaluation was better than that of the model it started from, "
                         "which ckpt.pt holds")
        return '\n'.join([*lines, following])

@dataclass
class Clock:
    """ how fast a run goes, and when it will end """
    tokens: int # per iteration
    flops: float # per iteration
    peak: float # FLOP/s of all devices together; 0 if unknown
    last: int # the iteration at which the run ends
    begin: tuple[int, float] | None = None # the first iteration that was reported, and when it began

    def __post_init__(self):
        self.start = time.perf_counter()

    def lap(self, iter_num: int, epoch: float, dt: float) -> tuple[dict, str]:
        """ log.csv's cells, and the words to print, for an iteration that took dt seconds """
        mfu = self.flops / dt / self.peak if self.peak else None
        speed = self.tokens / dt
        self.begin = self.begin or (iter_num, time.perf_counter() - dt) # excludes the first evaluation
        iteration = (time.perf_counter() - self.begin[1]) / (iter_num + 1 - self.begin[0])
        left = iteration * (self.last - iter_num - 1)
        return ({'time_ms': round(dt * 1000, 3), 'tokens_per_sec': round(speed, 1), 'mfu': mfu},
                f"time {dt * 1000:.2f}ms, {f'mfu {mfu:.2%}, ' if mfu else ''}{speed:,.0f} tok/s, "
                f"epoch {epoch:.2f}, eta {datetime.timedelta(seconds=round(left))}")

    def passed(self) -> datetime.timedelta:
        return datetime.timedelta(seconds=round(time.perf_counter() - self.start))

class Steady:
    """ a stream that shows each line at once, and survives a closed pipe or a full disk """

    def __init__(self, stream):
        self.stream, self.held = stream, '' # held: what a handler printed amid another line

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except RuntimeError: # in a signal's handler, amid another write
            self.held += text
        except OSError:
            pass
        else:
            if self.held and text.endswith('\n'):
                held, self.held = self.held, ''
                self.write(held)
        return len(text)

    def flush(self):
        self.write('')

    def __getattr__(self, name):
        return getattr(self.stream, name)

def steady_output() -> None:
    """ let print survive a closed terminal or `| tee`, and a full disk under `> train.log` """
    sys.stdout, sys.stderr = Steady(sys.stdout), Steady(sys.stderr)

def replacing_text(path: str):
    """ open a text file that replaces `path` once it is complete """
    return replacing(path, 'w', encoding='utf-8', newline='')

open_rows = {} # {log.csv: (the evaluation row that a resumed run ended with, its offset in the file)}

def start_log(out_dir: str, config: dict, facts: dict, resume_at: int | None) -> None:
    """ create config.json, and log.csv with the rows before iteration `resume_at` and that of its evaluation

    config holds the options as given; facts holds what became of some of them, and all else about the run.
    """
    facts = {**{key: facts['model_args'][key] for key in DEFAULTS}, **facts}
    path = os.path.join(out_dir, 'log.csv')
    try:
        rows = []
        if resume_at is not None and os.path.exists(path):
            with open(path, newline='') as file:
                whole = (line for line in file if line.endswith('\n')) # the last may be cut short
                rows = [row for row in csv.DictReader(whole)
                        if None not in row.values() and int(row['iter']) <= resume_at]
            if rows and list(rows[0]) != COLUMNS:
                raise ValueError('other columns')
        interval = config['sample_interval'] # a sample of iteration resume_at stays if none replaces it
        stays = resume_at is not None and (not interval or resume_at % interval > 0)
        keep_samples(os.path.join(out_dir, 'samples.txt'), (resume_at or 0) + stays)
        again = rows.pop() if rows and int(rows[-1]['iter']) == resume_at else None
        # first, since it is what tells a later run whose log.csv this is
        with replacing_text(os.path.join(out_dir, 'config.json')) as file:
            given = {key: value for key, value in config.items() if facts.get(key, value) != value}
            json.dump({**config, **facts, 'given': given}, file, indent=2)
        with replacing_text(path) as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
            if again and again['val_loss']: # kept until its iteration is run, which need not evaluate again
                open_rows[path] = again, file.tell()
                writer.writerow(again)
    except (KeyError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no log of train.py ({error}); move it away and "
                         "type this again") from None
    except OSError as error:
        raise cannot_write(out_dir, error) from None

def keep_samples(path: str, start_at: int) -> None:
    """ remove from samples.txt, if there is one, what was written at iteration `start_at` and later; all of
    the file, if that is all there is """
    if os.path.exists(path):
        with open(path, 'rb') as file:
            data = file.read()
        heads = re.finditer(rf'^{RULE}iteration (\d+)$'.encode(), data, re.MULTILINE)
        start = next((head.start() for head in heads if int(head[1]) >= start_at), None)
        if start:
            with replacing(path, 'wb') as file: # it may be another user's
                file.write(data[:start])
        elif start == 0:
            os.remove(path)

waiting = {} # {file: text that could not be written yet}

def append(path: str, text: str) -> None:
    """ append text to a file; if the disk does not take it, warn, and write it with the next text """
    text = waiting.pop(path, '') + text
    size = os.path.getsize(path) if os.path.exists(path) else 0
    try:
        with open(path, 'a', encoding='utf-8', newline='') as file:
            file.write(text)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        waiting[path] = text
        print(f"warning: cannot write to {path} ({error.strerror}); its next lines bring these",
              file=sys.stderr)

def finish_log(to_wandb: bool) -> None:
    """ retry what could not be written, and let wandb send the rest """
    for path in list(waiting):
        append(path, '')
    if to_wandb:
        send(need_wandb().finish)

def send(call, *args) -> None:
    """ call wandb; if its process is gone, or anything else fails there, warn: it is not worth a run """
    try:
        call(*args)
    except Exception as error:
        print(f"warning: wandb does not take this ({type(error).__name__}: {error}); log.csv has it all",
              file=sys.stderr)

def append_row(out_dir: str, row: dict, to_wandb: bool) -> None:
    """ append a row to log.csv, with empty cells for what was not measured; after an evaluation, redraw the
    report and the picture """
    path, cells = os.path.join(out_dir, 'log.csv'), io.StringIO()
    row = {k: v for k, v in row.items() if v is not None}
    written = {k: repr(v) for k, v in row.items()}
    before, start = open_rows.pop(path, ({}, 0))
    if before.get('iter') == written['iter']: # merge both into one row
        with contextlib.suppress(OSError):
            os.truncate(path, start)
        written = {**before, **written}
    csv.DictWriter(cells, COLUMNS).writerow(written)
    if to_wandb:
        send(need_wandb().log, row)
    append(path, cells.getvalue())
    if 'val_loss' in row:
        try:
            write_report(out_dir)
            plot_run(out_dir)
        except (ImportError, OSError, ValueError, KeyError, csv.Error) as error: # it is not worth a run
            print(f"no loss.png or report.md: {error}; later, python {script('plot.py')} {quote(out_dir)} "
                  "draws the picture")

def append_sample(out_dir: str, iter_num: int, text: str) -> None:
    """ append a text that the model wrote to samples.txt """
    append(os.path.join(out_dir, 'samples.txt'), f"{RULE}iteration {iter_num}\n{text}\n")

def is_logged(out_dir: str, iter_num: int) -> bool:
    """ whether log.csv holds this iteration's evaluation """
    with contextlib.suppress(OSError, KeyError, csv.Error):
        with open(os.path.join(out_dir, 'log.csv'), newline='') as file:
            return any(row['iter'] == str(iter_num) and row['val_loss'] for row in csv.DictReader(file))
    return False

def write_report(out_dir: str) -> None:
    """ write report.md from the run's other files """
    with open(os.path.join(out_dir, 'config.json')) as file:
        settings = json.load(file)
    with open(os.path.join(out_dir, 'log.csv'), newline='') as file:
        evaluated, timed = [], []
        for row in csv.DictReader(file): # there may be a million
            evaluated += [row] if row['val_loss'] else []
            timed += [float(row['tokens_per_sec'])] if row['tokens_per_sec'] else []
    best = min(evaluated, key=lambda row: float(row['val_loss'].replace('nan', 'inf')))
    all_learn = settings['trained'] == settings['parameters']
    lines = [f"# {os.path.basename(os.path.abspath(out_dir))}", '',
             f"Started from {settings['init_from']}, trained on {settings['dataset']} to iteration "
             f"{row['iter']} of {settings['max_iters']}, epoch {float(row['epoch']):.2f}. "
             f"The best validation loss is {float(best['val_loss']):.4f}, at iteration {best['iter']}. "
             f"Of {settings['parameters']:,} parameters, "
             f"{'all' if all_learn else format(settings['trained'], ',')} were trained.", '',
             '![loss](loss.png)', '', '| iteration | epoch | train loss | val loss |', '|---|---|---|---|']
    every = -(-len(evaluated) // 20) # about twenty rows, including the last
    lines += [f"| {row['iter']} | {float(row['epoch']):.2f} | {float(row['train_loss']):.4f} | "
              f"{float(row['val_loss']):.4f} |" for row in evaluated[::-1][::every][::-1]]
    speed = f", {statistics.median(timed):,.0f} tokens/s" if timed else ''
    lines += ['', f"On {settings['machine']}, {settings['device']} in {settings['dtype']}{speed}.", '']
    if os.path.exists(os.path.join(out_dir, 'samples.txt')):
        with open(os.path.join(out_dir, 'samples.txt'), encoding='utf-8', errors='replace',
                  newline='') as file:
            last = file.read().split(RULE)[-1]
        lines += ['What it wrote last:', '', *('    ' + line for line in last.splitlines()), '']
    lines += ['The configuration:', '',
              *(f'    {k} = {v!r}' for k, v in settings.items() if k not in ('model_args', 'given')), '']
    with replacing_text(os.path.join(out_dir, 'report.md')) as file:
        file.write('\n'.join(lines))

def need_wandb():
    """ the wandb package; raises ImportError if it is not installed """
    import wandb
    if not hasattr(wandb, 'init'): # only a folder that earlier runs left
        raise ImportError("wandb is not installed; run pip install wandb, or type --wandb_log=False")
    return wandb

def start_wandb(config: dict, resuming: bool) -> str | None:
    """ start a wandb run, or continue that of the resumed run, if one is asked for; return its id, or else
    the id that the resumed run had, if any """
    run_id = None
    with contextlib.suppress(OSError, ValueError, AttributeError): # if there is no config.json of a run
        if resuming:
            with open(os.path.join(config['out_dir'], 'config.json')) as file:
                run_id = json.load(file).get('wandb_id')
    if not config['wandb_log']:
        return run_id
    try:
        run = need_wandb().init(project=config['wandb_project'],
                                name=config['wandb_run_name'] or config['out_dir'],
                                config=config, id=run_id, resume='allow')
        # a resumed run may repeat iterations, so wandb's own steps are not enough
        run.define_metric('*', step_metric='iter')
        return run.id
    except Exception as error: # no key, no network
        raise OSError(f"wandb does not start ({error}); run wandb login, or set WANDB_MODE=offline") from None

def epoch_times(out_dir: str, config: dict) -> dict[str, float]:
    """ {plan: seconds per epoch} of the run in out_dir; {} if there is none of this model, data and kind of
    device """
    alike = ('init_from', 'dataset', 'block_size', 'batch_size', 'gradient_accumulation_steps', 'n_layer',
             'n_head', 'n_embd', 'dropout', 'freeze', 'lora_rank', 'optimizer', 'compile', 'shard', 'dtype',
             'processes')
    try:
        with open(os.path.join(out_dir, 'config.json')) as file:
            settings = json.load(file)
        settings |= {key: settings['given'].get(key, settings[key]) for key in DEFAULTS} # as given
        with open(os.path.join(out_dir, 'log.csv'), newline='') as file:
            rows = [row for row in csv.DictReader(file) if row['time_ms']]
        kinds = [each['device'].partition(':')[0] for each in (settings, config)] # cuda:1 is as fast as cuda
        if kinds[0] != kinds[1] or any(
                settings[key] != config[key] and config[key] not in ('auto', 'resume') for key in alike):
            return {}
        iters, epochs = (float(rows[-1][key]) - float(rows[0][key]) for key in ('iter', 'epoch'))
        iteration = statistics.median(float(row['time_ms']) for row in rows) / 1000
        return {settings['plan']: iteration * iters / epochs}
    except (OSError, ValueError, TypeError, AttributeError, LookupError, ZeroDivisionError, csv.Error):
        return {} # no run, or another program's
