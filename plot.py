"""
Draws log.csv into loss.png, the picture that train.py leaves in its out_dir:

$ python plot.py out-quickstart
"""
import csv
import os
import sys

def read_log(path: str) -> dict:
    """ (iterations, values) of each loss column, leaving out empty cells """
    with open(path, newline='') as file:
        rows = list(csv.DictReader(file))
    columns = {}
    for key in ('loss', 'train_loss', 'val_loss'):
        given = [row for row in rows if row[key]]
        columns[key] = [int(row['iter']) for row in given], [float(row[key]) for row in given]
    return columns

def plot_run(out_dir: str) -> str:
    """ draw the run in `out_dir` and return the picture's path """
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    curves = read_log(os.path.join(out_dir, 'log.csv'))
    figure, axes = plt.subplots(figsize=(8, 5), dpi=100)
    axes.plot(*curves['loss'], color='#bbbbbb', linewidth=0.8, label='training loss of the iteration')
    axes.plot(*curves['train_loss'], color='#1f77b4', marker='.', label='train split')
    label = 'val split'
    if curves['val_loss'][1]:
        best, at = min(zip(curves['val_loss'][1], curves['val_loss'][0]))
        axes.plot([at], [best], 'o', color='#d62728', fillstyle='none', markersize=10)
        label += f', best {best:.4f} at iteration {at}'
    axes.plot(*curves['val_loss'], color='#d62728', marker='.', label=label)
    title = os.path.basename(os.path.abspath(out_dir))
    axes.set(xlabel='iteration', ylabel='loss, nats a token', title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    path = os.path.join(out_dir, 'loss.png')
    figure.tight_layout()
    figure.savefig(path + '.tmp', format='png')
    plt.close(figure)
    os.replace(path + '.tmp', path)
    return path

if __name__ == '__main__':
    if len(sys.argv) != 2 or not os.path.isfile(os.path.join(sys.argv[1], 'log.csv')):
        print("error: no run's folder given; type python plot.py OUT_DIR, one with a "
              "log.csv", file=sys.stderr)
        sys.exit(2)
    try:
        print(plot_run(sys.argv[1]))
    except (KeyError, ValueError) as error:
        print(f"error: {sys.argv[1]}/log.csv is no log of train.py ({error}); give another "
              "folder", file=sys.stderr)
        sys.exit(2)
