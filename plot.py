"""
Draws a run's log.csv into its loss.png, as train.py does, or several runs into compare.png:

$ python plot.py out-quickstart
$ python plot.py out-first out-second
"""
import csv
import gc
import os
import sys
import warnings

from configurator import report

COLOURS = '#d62728', '#1f77b4', '#2ca02c', '#9467bd', '#ff7f0e', '#17becf'

def read_log(out_dir: str) -> dict:
    """ (iterations, values) of each loss column, leaving out empty cells """
    columns, row = {key: ([], []) for key in ('loss', 'train_loss', 'val_loss')}, None
    with open(os.path.join(out_dir, 'log.csv'), encoding='utf-8', newline='') as file:
        try:
            for row in csv.DictReader(line for line in file if line.endswith('\n')): # the last may be cut off
                for key, (iters, values) in columns.items():
                    if row[key] not in ('', 'nan'):
                        iters.append(int(row['iter']))
                        values.append(float(row[key]))
        except csv.Error as error:
            raise ValueError(error) from None
    if row is None:
        raise ValueError('it has no rows yet')
    return columns

def name_of(out_dir: str) -> str:
    name = os.path.basename(os.path.abspath(out_dir)).replace('$', r'\$') # $ starts a formula
    return f' {name}' if name.startswith('_') else name # a legend leaves out what begins with _

def plot_run(out_dir: str) -> str:
    """ draw the run in `out_dir` and return the picture's path """
    def draw(axes):
        curves = read_log(out_dir)
        every = slice(None, None, len(curves['loss'][0]) // 2000 + 1)
        axes.plot(*(values[every] for values in curves['loss']), color='#bbbbbb', linewidth=0.8,
                  label='training loss of the iteration')
        axes.plot(*curves['train_loss'], color='#1f77b4', marker='.', label='train split')
        label = 'val split'
        if curves['val_loss'][1]:
            best, at = min(zip(curves['val_loss'][1], curves['val_loss'][0]))
            axes.plot([at], [best], 'o', color='#d62728', fillstyle='none', markersize=10)
            label += f', best {best:.4f} at iteration {at}'
        axes.plot(*curves['val_loss'], color='#d62728', marker='.', label=label)
        axes.set_title(name_of(out_dir))
    return picture(draw, os.path.join(out_dir, 'loss.png'))

def plot_runs(out_dirs: list[str]) -> str:
    """ draw the splits' losses of several runs into compare.png here, and return its path """
    def draw(axes):
        for i, out_dir in enumerate(out_dirs):
            curves, colour = read_log(out_dir), COLOURS[i % len(COLOURS)]
            best = f", best {min(curves['val_loss'][1]):.4f}" if curves['val_loss'][1] else ''
            axes.plot(*curves['train_loss'], color=colour, linestyle=':')
            axes.plot(*curves['val_loss'], color=colour, marker='.', label=f"{name_of(out_dir)}{best}")
        axes.set_title('val split, and dotted the train split')
    return picture(draw, 'compare.png')

def picture(draw, path: str) -> str:
    """ let `draw` plot onto axes of loss by iteration, and save the figure to `path` """
    os.environ['MPLBACKEND'] = 'agg' # a notebook's own would be refused in another environment
    from matplotlib.backends.backend_agg import FigureCanvasAgg # pyplot would keep it, and need a screen
    from matplotlib.figure import Figure
    # a picture is drawn at every evaluation: fixed margins and print_png draw it once, tight_layout and
    # savefig three times
    canvas = FigureCanvasAgg(Figure(figsize=(8, 5), dpi=100))
    axes = canvas.figure.add_axes((0.09, 0.1, 0.89, 0.83))
    try:
        draw(axes)
        axes.set(xlabel='iteration', ylabel='loss, nats a token')
        axes.ticklabel_format(axis='y', scilimits=(-2, 5)) # long labels would not fit the margin
        axes.grid(alpha=0.3)
        axes.legend(loc='upper right') # searching for the best place is slow
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Glyph') # a folder's name may have letters that the font lacks
            canvas.print_png(path + '.tmp')
        os.replace(path + '.tmp', path)
    finally:
        if os.path.exists(path + '.tmp'):
            os.remove(path + '.tmp')
        del axes, canvas
        gc.collect(1) # they refer to each other, and would pile up in a long run; only young objects, so fast
    return path

if __name__ == '__main__':
    sys.excepthook = report
    out_dirs = [arg.removeprefix('--out_dir=') for arg in sys.argv[1:]]
    if '--help' in out_dirs or '-h' in out_dirs:
        print(__doc__.strip())
        sys.exit(0)
    without = [out_dir for out_dir in out_dirs if not os.path.isfile(os.path.join(out_dir, 'log.csv'))]
    if without or not out_dirs:
        found = f"there is no log.csv in {without[0]}" if without else "no run's folder given"
        raise ValueError(f"{found}; type python plot.py OUT_DIR, or several, each with a log.csv")
    try:
        print(plot_run(out_dirs[0]) if len(out_dirs) == 1 else plot_runs(out_dirs))
    except (KeyError, ValueError) as error:
        logs = ' or '.join(os.path.join(out_dir, 'log.csv') for out_dir in out_dirs)
        raise ValueError(f"{logs} cannot be drawn ({error}); expected one of train.py; give another "
                         "folder") from None
    except OSError as error:
        raise OSError(f"cannot write the picture ({error}); go to a folder that can be written") from None
