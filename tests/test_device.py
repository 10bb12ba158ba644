import sys
import types

import numpy as np
import pytest
import torch
import torch._inductor.compile_fx

import device
from model import GPT, GPTConfig

def test_a_device_or_dtype_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no device 'cuda:99'.*auto"):
        device.pick_device('cuda:99')
    with pytest.raises(ValueError, match="no device 'gpu'"):
        device.pick_device('gpu')
    with pytest.raises(ValueError, match="no dtype 'fp16'"):
        device.pick_dtype('fp16', 'cpu')
    assert device.pick_device('cpu') == 'cpu' and device.pick_dtype('float16', 'cpu') == 'float16'

@pytest.mark.parametrize('amx, avx, expected', [(True, False, 'bfloat16'), (False, True, 'bfloat16'),
                                                (False, False, 'float32')])
def test_a_cpu_computes_in_bfloat16_only_where_its_hardware_does(monkeypatch, amx, avx, expected):
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: avx)
    assert device.pick_dtype('auto', 'cpu') == expected

@pytest.mark.parametrize('emulated, expected', [(False, 'float16'), (True, 'bfloat16')])
def test_a_gpu_without_bfloat16_computes_in_float16(monkeypatch, emulated, expected):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported',
                        lambda including_emulation: including_emulation or emulated)
    assert device.pick_dtype('auto', 'cuda') == expected

BUILT = ['sm_75', 'sm_80', 'sm_86', 'sm_90', 'sm_100', 'sm_120'] # as of torch 2.11 for CUDA 13

@pytest.mark.parametrize('built, capability, runs', [
    (BUILT, (6, 0), False), (BUILT, (7, 0), False), (BUILT, (7, 5), True), (BUILT, (8, 0), True),
    (BUILT, (8, 9), True), (BUILT, (11, 0), False), (BUILT, (12, 1), True),
    ([*BUILT, 'compute_120'], (13, 0), True), (BUILT, (13, 0), False),
    (['sm_90a'], (9, 0), True), (['gfx90a'], (9, 0), True), ([], (6, 0), True)])
def test_a_gpu_that_this_build_of_torch_has_no_kernels_for_is_refused(monkeypatch, built, capability, runs):
    for name, value in (('is_available', True), ('device_count', 1), ('get_arch_list', built),
                        ('get_device_name', 'Tesla P100'), ('get_device_capability', capability)):
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    assert device.has_kernels(capability) == runs
    if runs:
        assert device.pick_device('auto') == device.pick_device('cuda') == 'cuda'
    for name in ('auto', 'cuda') if not runs else ():
        with pytest.raises(ValueError, match=r'no kernels for Tesla P100, only for sm_75, .*; '
                                             r'run pip install .*/cu126 for older'):
            device.pick_device(name)
    assert device.pick_device('cpu') == 'cpu'

@pytest.mark.parametrize('cuda, why', [('13.0', 'too old for this build'),
                                       (None, 'a build of torch without CUDA')])
def test_a_driver_that_torch_cannot_use_is_told_once_a_machine(monkeypatch, capsys, cuda, why):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.version, 'cuda', cuda)
    monkeypatch.setattr(device.shutil, 'which', lambda name: f'/usr/bin/{name}')
    assert device.pick_device('auto') in ('cpu', 'mps')
    if device.pick_device('auto') == 'cpu':
        told = capsys.readouterr().err
        assert told.count('warning: the NVIDIA driver here') == 2 and why in told and '/whl/cu' in told
    monkeypatch.setenv('LOCAL_RANK', '1')
    device.pick_device('auto')
    device.pick_device('cpu')
    monkeypatch.setattr(device.shutil, 'which', lambda name: None)
    monkeypatch.setenv('LOCAL_RANK', '0')
    device.pick_device('auto')
    assert not capsys.readouterr().err

@pytest.mark.parametrize('name, dtype, emulated, warned', [
    ('cuda', 'bfloat16', True, True), ('cuda', 'bfloat16', False, False),
    ('cuda', 'float16', True, False), ('cpu', 'bfloat16', True, False)])
def test_bfloat16_on_a_gpu_that_only_emulates_it_is_warned_of(
        monkeypatch, capsys, name, dtype, emulated, warned):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported',
                        lambda including_emulation: including_emulation or not emulated)
    assert device.pick_dtype(dtype, name) == dtype
    assert ('type --dtype=float16' in capsys.readouterr().err) == warned
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert device.pick_dtype(dtype, name) == dtype and not capsys.readouterr().err # told once a machine

def test_a_mac_s_gpu_takes_no_more_than_the_ram_that_is_free(monkeypatch):
    monkeypatch.setattr(torch.mps, 'recommended_max_memory', lambda: 5 * 2**30)
    monkeypatch.setattr(torch.mps, 'driver_allocated_memory', lambda: 2**30)
    for free, expected in ((8, 4), (3, 3)):
        monkeypatch.setattr(device.psutil, 'virtual_memory',
                            lambda: types.SimpleNamespace(available=free * 2**30))
        assert device.free_memory('mps') == expected * 2**30

@pytest.mark.parametrize('name, pinned', [('cuda:1', True), ('mps', False), ('cpu', False)])
def test_only_what_is_pinned_is_copied_while_its_memory_may_go(monkeypatch, name, pinned):
    at_work = []
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda self: at_work.append('pinned') or self)
    monkeypatch.setattr(torch.Tensor, 'to',
                        lambda self, device, non_blocking: (self.tolist(), device, non_blocking))
    assert device.fetch(np.arange(2), np.arange(3), name) == (([0, 1], name, pinned),
                                                              ([0, 1, 2], name, pinned))
    assert len(at_work) == 2 * pinned

@pytest.fixture
def model():
    yield GPT(GPTConfig(8, 11, 1, 1, 8))
    torch.compiler.set_stance('default')

def test_a_broken_compiler_costs_one_warning(monkeypatch, capsys, model):
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nand a long explanation")
    monkeypatch.setattr(torch._inductor.compile_fx, 'compile_fx', broken)
    x = torch.zeros(1, 8, dtype=torch.long)
    expected = model(x, x)[1]
    assert not device.compile_model([model], lambda: model(x, x))
    err = capsys.readouterr().err
    assert (err.count('warning') == err.count('\n') == 1
            and 'no C++ compiler' in err and 'going on without it' in err)
    assert model(x, x)[1] == expected # it still runs

@pytest.mark.parametrize('name, index', [('cuda', None), ('cuda:1', 1)])
def test_memory_gb_limits_the_gpu_that_is_used(monkeypatch, name, index):
    asked = []
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (80 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, 'get_device_properties',
                        lambda device: types.SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(torch.cuda.memory, '_lazy_init', lambda: None)
    monkeypatch.setattr(torch._C, '_cuda_setMemoryFraction',
                        lambda fraction, at: asked.append((fraction, at)), raising=False)
    assert device.memory_to_fill(name, 8.0) == pytest.approx(0.95 * 7.4 * 2**30, rel=1e-3)
    assert asked == [(pytest.approx(7.4 / 80, rel=1e-3), index or 0)]

def test_a_card_that_is_not_here_is_all_there_is(monkeypatch):
    monkeypatch.setattr(device, 'free_memory', lambda name: 2**30)
    assert device.memory_to_fill('cpu', 8.0, elsewhere=True) == pytest.approx(0.95 * 7.4 * 2**30)
    # no more than is free
    assert device.memory_to_fill('cpu', 8.0) == device.memory_to_fill('cpu', 0.0) == 0.75 * 2**30
    assert device.memory_to_fill('cpu', 0.5) == 0.75 * 2**29 # CUDA takes none of it

STAT = 'anon 1000000000\nfile 14000000000\n{}inactive_file 13000000000\nactive_file 1\n'

def write_group(folder, limit, used, most='memory.max', now='memory.current', stat=STAT.format('')):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in ((most, limit), (now, used), ('memory.stat', stat)):
        (folder / name).write_text(f'{text}\n')

def groups(root, text):
    (root / 'proc/self').mkdir(parents=True)
    (root / 'proc/self/cgroup').write_text(text)
    return root / 'sys/fs/cgroup'

def test_what_a_container_or_a_job_may_take_is_counted_and_files_that_it_caches_are_free(
        tmp_path, monkeypatch):
    top = groups(tmp_path, 'odd\n\n0::/job/step\n')
    write_group(top, 16_000_000_000, 15_000_000_000)
    assert device.group_memory(tmp_path) == 14_000_000_000
    write_group(top / 'job', 'max', 1)
    assert device.group_memory(tmp_path) == 14_000_000_000
    write_group(top / 'job/step', 14_500_000_000, 14_000_000_000)
    assert device.group_memory(tmp_path) == 13_500_000_000
    monkeypatch.setattr(device, 'group_memory', lambda: device.psutil.virtual_memory().total // 100)
    assert device.free_memory('cpu') == device.group_memory()

def test_the_limits_of_older_control_groups_are_counted_and_none_is_no_limit(tmp_path):
    top = groups(tmp_path, '3:cpu,cpuacct:/x\n2:cpu,memory:/slurm/job_7\n')
    assert device.group_memory(tmp_path) == device.group_memory(tmp_path / 'none') == float('inf')
    old = 'memory.limit_in_bytes', 'memory.usage_in_bytes', STAT.format('total_')
    write_group(top / 'memory/slurm/job_7', 16_000_000_000, 15_000_000_000, *old)
    write_group(top / 'memory', 2**63 - 4096, 15_000_000_000, *old)
    assert device.group_memory(tmp_path) == 14_000_000_000

def test_cudnn_s_attention_is_for_training_without_dropout():
    allowed = torch.backends.cuda.cudnn_sdp_enabled
    for dropout in (0.1, 0.0):
        device.train_fast('cuda', dropout)
        assert allowed() == (dropout == 0)
    for name in ('auto', 'cpu'):
        device.allow_cudnn_attention(True)
        device.pick_device(name)
        assert not allowed()
    torch.set_float32_matmul_precision('highest')

def test_compile_is_left_out_on_a_cpu_unless_asked_for(model):
    assert not device.pick_compile('auto', 'cpu') and device.pick_compile(True, 'cpu')
    with pytest.raises(ValueError, match='--compile=auto, True or False'):
        device.pick_compile('yes', 'cpu')

def test_processes_of_a_machine_share_its_free_ram(monkeypatch):
    monkeypatch.setattr(device, 'group_memory', lambda: float('inf'))
    monkeypatch.setattr(device.psutil, 'virtual_memory', lambda: types.SimpleNamespace(available=8 * 2**30))
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    assert device.free_memory('cpu') == 2 * 2**30

def test_a_gpu_that_is_only_named_after_a_known_one_has_no_peak(monkeypatch):
    for name, known in (
            ('NVIDIA GeForce RTX 4090', True), ('NVIDIA GeForce RTX 3080 Ti', False),
            ('NVIDIA GeForce RTX 4090 Laptop GPU', False), ('NVIDIA H100 80GB HBM3', True),
            ('NVIDIA H100 NVL', False), ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', False),
            ('NVIDIA GeForce RTX 4090 D', False)):
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda at: name)
        assert (device.peak_flops('cuda', 'bfloat16') is not None) == known

@pytest.mark.skipif(sys.platform != 'linux', reason="units differ between systems")
def test_resident_memory_is_in_mebibytes():
    with open('/proc/self/status') as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith('VmHWM')) # in KiB
    assert device.memory_mb('cpu') == pytest.approx(peak / 2**10, rel=0.05)

def test_resident_memory_is_known_on_windows(monkeypatch):
    monkeypatch.setitem(sys.modules, 'resource', None)
    monkeypatch.setattr(device.psutil, 'Process', lambda: types.SimpleNamespace(
        memory_info=lambda: types.SimpleNamespace(peak_wset=3 * 2**20)))
    assert device.memory_mb('cpu') == 3

def test_a_gpu_s_peak_is_its_data_sheet_s(monkeypatch):
    for name, tera in (('NVIDIA A100-SXM4-80GB', 312), ('NVIDIA H100 PCIe', 756), ('NVIDIA L40S', 362),
                       ('Tesla V100-PCIE-16GB', 112), ('Tesla V100-SXM2-16GB', 125), ('Tesla T4', 65),
                       ('NVIDIA L4', 121)):
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda at: name)
        assert device.peak_flops('cuda', 'bfloat16') == tera * 1e12
        assert device.peak_flops('cuda', 'float32') is None
