"""
Writes a run's folder: one run at a time, each checkpoint complete or not at all. checkpoint.py reads it.
"""
import contextlib
import glob
import os
import shutil
import sys
import time

import torch

VERSION = 1 # of the format; raised when older readers would go wrong

def replace(path: str, to: str) -> None:
    """ os.replace, tried for a second, since Windows refuses it while a program reads the file """
    for tries in range(10):
        try:
            return os.replace(path, to)
        except PermissionError:
            if tries == 9:
                raise
            time.sleep(0.1)

@contextlib.contextmanager
def replacing(path: str, mode: str, **options):
    """ open a file that replaces `path` once it is complete and on the disk; an error leaves nothing """
    try:
        with open(path + '.tmp', mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(path + '.tmp', path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(path + '.tmp')
        raise

def save(checkpoint: dict, path: str) -> None:
    """ write `path` so that it holds either the old checkpoint or the new one, whenever the machine stops;
    raises OSError if it cannot """
    try:
        with replacing(path, 'wb') as file:
            torch.save({**checkpoint, 'version': VERSION}, file)
    except (OSError, RuntimeError) as error: # torch raises RuntimeError when the disk is full
        why = str(error).strip().partition('\n')[0] or type(error).__name__
        why = why if isinstance(error, OSError) else f'no space left on the disk? {why}'
        raise OSError(f"cannot save {path} ({why}); what it held before is whole") from None

def checkpoints_in(out_dir: str) -> list[str]:
    """ the checkpoints of the run in out_dir that exist, latest first """
    paths = (os.path.join(out_dir, name) for name in ('last.pt', 'ckpt.pt'))
    return [path for path in paths if os.path.isfile(path)]

def link(path: str, to: str) -> None:
    """ make `to` a hard link to `path`, or a copy if the file system has no links """
    if os.path.exists(to + '.tmp'):
        os.remove(to + '.tmp')
    try:
        os.link(path, to + '.tmp')
    except OSError:
        with open(path, 'rb') as whole, replacing(to, 'wb') as file:
            shutil.copyfileobj(whole, file)
    else:
        replace(to + '.tmp', to)

def cannot_write(out_dir: str, error: OSError) -> OSError:
    """ the error for a run whose folder cannot be written """
    return OSError(f"cannot write to {out_dir} ({error.strerror}); mend that, or type "
                   "--out_dir=ANOTHER (where a run is resumed, with a copy of this folder)")

held = [] # the file that this process's one run has locked; in a notebook, the next run closes it

def take(file: int) -> None:
    """ lock an open file until it is closed; raises BlockingIOError if another process has, OSError if there
    are no locks """
    try:
        import fcntl
    except ImportError: # Windows
        import msvcrt
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(*error.args) from None
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

class Saver:
    """ saves a run's last.pt, ckpt.pt and, with keeps_all, iter_000500.pt; if a save fails, it prints a
    warning and leaves it to the next one """

    def __init__(self, out_dir: str, keeps_all: bool):
        self.out_dir, self.keeps_all = out_dir, keeps_all
        self.saved, self.error = None, None # the iteration in last.pt; why the latest save failed
        self.before = self.stamp()

    def stamp(self) -> list:
        """ the checkpoints' times and sizes, which change whenever a run saves there """
        return [(os.stat(path).st_mtime_ns, os.path.getsize(path)) for path in checkpoints_in(self.out_dir)]

    def lock(self) -> None:
        """ create out_dir, and keep other runs out of it until this process ends, in whatever way

        Raises FileExistsError if another run holds it, or has saved there since this Saver was made; OSError
        if nothing can be written.
        """
        path = os.path.join(self.out_dir, '.lock')
        try:
            os.makedirs(self.out_dir, exist_ok=True)
            ours = os.access(path, os.W_OK) or not os.path.exists(path) # else another user's run made it
            while held:
                os.close(held.pop())
            held.append(os.open(path, os.O_RDWR | os.O_CREAT if ours else os.O_RDONLY, 0o666))
        except OSError as error:
            raise cannot_write(self.out_dir, error) from None
        for tries in range(50): # a run that was just killed may take some seconds
            try:
                take(held[0])
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError: # a file system without locks
                print(f"warning: no file can be locked in {self.out_dir}; see that no other run writes there",
                      file=sys.stderr)
                break
        else:
            raise FileExistsError(f"another run is writing to {self.out_dir}; end it, or type "
                                  "--out_dir=ANOTHER")
        if self.stamp() != self.before:
            raise FileExistsError(f"another run has just saved to {self.out_dir}; type this again, or "
                                  "--out_dir=ANOTHER")

    def clear(self, anew: bool) -> None:
        """ remove what a killed save left and, for a run that begins `anew`, earlier checkpoints """
        patterns = ['*.pt.tmp']
        if anew:
            patterns += ['last.pt', 'ckpt.pt', 'iter_*.pt']
        for pattern in patterns:
            for path in glob.glob(os.path.join(glob.escape(self.out_dir), pattern)):
                os.remove(path)

    def __call__(self, checkpoint: dict, is_best: bool | None) -> bool:
        """ write last.pt, and link ckpt.pt to it if it is the best (None: not evaluated); return whether that
        succeeded """
        last, iter_num = os.path.join(self.out_dir, 'last.pt'), checkpoint['iter_num']
        started = time.perf_counter()
        try:
            if not all(tensor.isfinite().all() for tensor in checkpoint['model'].values()):
                raise ValueError(f"the weights are not finite; {last} keeps earlier ones")
            save(checkpoint, last)
            self.saved = iter_num
            if is_best:
                link(last, os.path.join(self.out_dir, 'ckpt.pt'))
            if self.keeps_all and is_best is not None:
                link(last, os.path.join(self.out_dir, f'iter_{iter_num:06d}.pt'))
        except (OSError, ValueError) as error:
            self.error = error
            print(f"warning: iter {iter_num}: {error}; the next save is another try", file=sys.stderr)
            return False
        self.error = None
        if is_best is None:
            print(f"iter {iter_num}: saved {last}, {os.path.getsize(last) / 1e6:,.1f} MB in "
                  f"{time.perf_counter() - started:.1f} s")
        return True

    def check(self) -> None:
        """ at the end of a run, raise OSError if no save succeeded, and warn if the latest did not """
        if self.saved is None and self.error:
            raise OSError(f"{self.error}; nothing of this run was saved; make room on the disk, or type "
                          "--out_dir=ANOTHER")
        if self.error:
            print(f"warning: the last save failed; {os.path.join(self.out_dir, 'last.pt')} is of iteration "
                  f"{self.saved}", file=sys.stderr)
