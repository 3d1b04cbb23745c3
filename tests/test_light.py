"""What a cache alone needs: no browser driver, no pictures, no plots."""

import subprocess
import sys

WITHOUT = "import sys\nfor x in ('playwright', 'gymnasium', 'PIL', 'matplotlib', 'diffusers'): sys.modules[x] = None\n"


def test_caches_and_diffusion_models_import_without_the_extras():
    code = WITHOUT + "import textkv, agentkv, dlm, textkv.conformance; print('gui-kv' in textkv.list_methods())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "True", run.stderr


def test_browsers_name_the_extra_that_they_need():
    code = (
        "import importlib.util as util\nfound = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'gymnasium' else found(name, *rest)\nimport agentkv.envs"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    assert last.endswith("gymnasium is missing: browsers and screenshots need pip install 'agentkv[agents]'")
