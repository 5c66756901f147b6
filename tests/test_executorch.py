"""Several sub-networks in one ExecuTorch program, where that is installed."""

import importlib.util

import pytest
import torch
from bundle_cases import POINTS, bundled

from dynlib.deploy.executorch import export_pte
from dynlib.errors import BundleError
from dynlib.nets.chain import resized

INSTALLED = importlib.util.find_spec("executorch") is not None


@pytest.mark.skipif(not INSTALLED, reason="ExecuTorch is not installed")
def test_every_method_answers_as_torch_does(tmp_path):
    from executorch.runtime import Runtime

    supernet, file = bundled(), tmp_path / "net.pte"
    names = export_pte(supernet, POINTS, file)
    program = Runtime.get().load_program(file)
    assert program.method_names == set(names)
    probe = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for name, config in zip(names, POINTS, strict=True):
        image = resized(probe, config.resolution).contiguous()
        with torch.no_grad():
            want = supernet.extract(config)(image)
        (logits,) = program.load_method(name).execute([image])
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(INSTALLED, reason="ExecuTorch is installed")
def test_without_it_it_says_what_to_install(tmp_path):
    with pytest.raises(BundleError, match="pip install executorch"):
        export_pte(bundled(), POINTS, tmp_path / "net.pte")
    assert not list(tmp_path.iterdir())
