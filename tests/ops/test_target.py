"""Which kernels serve which GPU, and what is said of a GPU without kernels."""

import pytest
import torch


@pytest.mark.parametrize("gpu, path", [((7, 0), 70), ((7, 5), 70), ((8, 6), 80), ((6, 1), 0), ((9, 0), 90)])
def test_a_gpu_is_served_by_the_path_compiled_for_it(emulated, gpu, path):
    assert emulated.arches == ["70", "80", "90a"]
    assert emulated.path_serving(*gpu) == path


@pytest.mark.parametrize(
    "gpu, words",
    [
        ((7, 0), "V is sm_70, built for 70;80;90a: rebuild with CACO_ARCHES=70 and nvcc 12, as CUDA 13 has no sm_70"),
        ((7, 5), "V is sm_75, built for 70;80;90a: rebuild with CACO_ARCHES=75"),
        ((6, 1), "V is sm_61, the kernels need sm_70 or later"),
    ],
)
def test_a_gpu_without_kernels_is_told_what_to_do(cuda_ops, monkeypatch, gpu, words):
    monkeypatch.setattr(cuda_ops, "available", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "V")
    assert cuda_ops.why_not(torch.device("cuda")) == words


def test_bfloat16_operands_are_refused_where_there_are_none(emulated):
    with pytest.raises(ValueError, match="found bfloat16 operands, expected float16"):
        emulated.bank_attend(emulated.Target(70, 0, 3, 0), emulated.AttendParams())  # bfloat16 is the type of zeros
