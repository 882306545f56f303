"""Plugins as other people ship them: fake distributions (a dist-info folder and a module) on sys.path."""

import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

import tanglenas_engine.plugins as plugins
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.plugins import KINDS, PluginManager, PluginWarning, hookimpl, hookspecs

SPACE = """
    from tanglenas_engine import hookimpl

    @hookimpl
    def tanglenas_register_spaces(register):
        register("{name}", "{module}_space:Space", summary="a space", width=4)
"""
SPACE_CLASS = """
    from tanglenas_engine.errors import TangleNASError

    class Base:
        def __init__(self, num_classes=10, *, relaxation="exact"):
            self.num_classes, self.relaxation = num_classes, relaxation

    class Space(Base):
        def __init__(self, width, depth=2, **options):
            if width < 0:
                raise TangleNASError("width must be positive")
            super().__init__(**options)
            self.width, self.depth = width, depth
"""


class Site:
    """A folder on sys.path into which distributions are installed."""

    def __init__(self, folder: Path):
        self.folder = folder

    def install(self, distribution: str, code: str, *, version="1.0", entry_point="theirs", module=None):
        module = module or distribution.replace("-", "_")
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[tanglenas]\n{entry_point} = {module}\n")
        self.write(module, code)

    def install_space(self, distribution: str, name: str, **where: str):
        module = distribution.replace("-", "_")
        self.install(distribution, SPACE.format(name=name, module=module), **where)
        self.write(f"{module}_space", SPACE_CLASS)

    def write(self, module: str, code: str):
        (self.folder / f"{module}.py").write_text(textwrap.dedent(code))


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.delenv("TANGLENAS_PLUGINS", raising=False)
    monkeypatch.delenv("TANGLENAS_STRICT_PLUGINS", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield Site(tmp_path)
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def load_warned() -> tuple[PluginManager, list[str]]:
    """The plugins as installed, and what was said while they loaded."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        manager = PluginManager()
    assert {warning.category for warning in caught} <= {PluginWarning}
    return manager, [str(warning.message) for warning in caught]


def test_the_built_in_names_come_through_the_entry_points(site):
    manager = PluginManager()
    spaces = {"autoformer_nano", "autoformer_t", "autoformer_s", "autoformer_b"}
    assert spaces <= set(manager.names("space"))
    assert {"darts", "drnas", "spos"} <= set(manager.names("optimizer"))
    assert {"digits", "fashion_mnist", "image_folder"} <= set(manager.names("dataset"))
    small = manager.resolve("space", "autoformer_s")
    assert (small.distribution, small.defaults["num_heads"]) == ("tanglenas", (5, 6, 7))


def test_an_installed_plugin_is_listed_and_created_with_its_defaults(site):
    site.install_space("tanglenas-theirs", "theirs", version="2.1")
    manager = PluginManager()
    registration = manager.resolve("space", "theirs")
    assert (registration.distribution, registration.version) == ("tanglenas-theirs", "2.1")
    assert (registration.plugin.entry_point, registration.summary) == ("theirs", "a space")
    space = manager.create("space", "theirs", relaxation="paper")
    assert (space.width, space.depth, space.relaxation) == (4, 2, "paper")
    assert manager.create("space", "theirs", width=8).width == 8
    assert manager.create("space", "theirs").width == 4


def test_every_kind_has_its_hook_and_accepts_classes_and_functions(site):
    site.install(
        "tanglenas-theirs",
        "from tanglenas_engine import hookimpl\nclass Thing:\n    pass\n"
        "def make(**options):\n    return options\n"
        + "".join(
            f"@hookimpl\ndef {hook}(register):\n    register('a', Thing)\n    register('b', make, size=1)\n"
            for hook in hookspecs.HOOKS
        ),
    )
    manager = PluginManager()
    for kind in KINDS:
        assert type(manager.create(kind, "a")).__name__ == "Thing"
        assert manager.create(kind, "b", anything=2) == {"size": 1, "anything": 2}


def test_create_names_what_it_made(site, monkeypatch):
    code = SPACE.replace("spaces", "{kind}s").format(name="theirs", module="tanglenas_theirs", kind="{kind}")
    hooks = [code.format(kind=kind) for kind in ("space", "optimizer", "dataset")]
    site.install("tanglenas-theirs", "".join(map(textwrap.dedent, hooks)))
    site.write("tanglenas_theirs_space", SPACE_CLASS)
    fresh = PluginManager()
    monkeypatch.setattr(plugins, "manager", lambda: fresh)
    for create in (plugins.create_space, plugins.create_optimizer, plugins.create_dataset):
        assert create("theirs", depth=3).name == "theirs"
        assert create("theirs", depth=3).depth == 3
    with pytest.raises(TangleNASError, match="unknown objective 'theirs'"):
        plugins.create_objective("theirs")


def test_a_plugin_that_cannot_be_imported_is_named_and_the_rest_works(site):
    site.install("tanglenas-broken", "import a_module_that_is_not_there", version="0.3")
    site.install("tanglenas-exits", "raise SystemExit(3)")
    site.install_space("tanglenas-theirs", "theirs")
    manager, said = load_warned()
    assert len(said) == 2
    assert "tanglenas-broken 0.3 (entry point 'theirs') cannot be imported" in said[0]
    assert "ModuleNotFoundError: No module named 'a_module_that_is_not_there'" in said[0]
    assert "tanglenas-exits 1.0" in said[1] and "SystemExit: 3" in said[1]
    assert [fault.plugin.distribution for fault in manager.faults] == ["tanglenas-broken", "tanglenas-exits"]
    assert isinstance(manager.faults[0].cause, ModuleNotFoundError)
    assert manager.create("space", "theirs").width == 4
    assert "autoformer_t" in manager.names("space")


def test_an_unknown_name_also_names_the_broken_plugin_that_may_have_provided_it(site):
    site.install("tanglenas-broken", "import a_module_that_is_not_there", version="0.3")
    manager, _ = load_warned()
    with pytest.raises(TangleNASError) as error:
        manager.resolve("space", "autoformer_tt")
    message = str(error.value)
    assert "unknown space 'autoformer_tt'. Did you mean 'autoformer_t'?" in message
    assert "autoformer_nano" in message
    assert "tanglenas-broken 0.3" in message and "No module named 'a_module_that_is_not_there'" in message


def test_an_unknown_name_mentions_no_plugin_when_all_are_well(site):
    with pytest.raises(TangleNASError) as error:
        PluginManager().resolve("optimizer", "dartz")
    assert str(error.value) == "unknown optimizer 'dartz'. Did you mean 'darts'? Choose one of: " + (
        ", ".join(PluginManager().names("optimizer")) + "."
    )


def test_an_unknown_kind_is_refused(site):
    with pytest.raises(TangleNASError, match=r"unknown kind of plugin 'spaces'. Did you mean 'space'"):
        PluginManager().names("spaces")


def test_a_hook_that_raises_is_named_and_its_neighbours_still_run(site):
    site.install(
        "tanglenas-raises",
        """
        from tanglenas_engine import hookimpl

        @hookimpl
        def tanglenas_register_datasets(register):
            raise KeyError("oops")

        @hookimpl
        def tanglenas_register_optimizers(register):
            register("fine", "m:C")
        """,
    )
    site.install_space("tanglenas-theirs", "theirs")
    manager, said = load_warned()
    assert len(said) == 1
    assert "tanglenas-raises 1.0" in said[0]
    assert "failed in tanglenas_register_datasets: KeyError: 'oops'" in said[0]
    assert "fine" in manager.names("optimizer") and "theirs" in manager.names("space")


@pytest.mark.parametrize(
    ("hook", "said_of_it"),
    [
        (
            "def tanglenas_register_space(register): pass",
            "unknown hook 'tanglenas_register_space'. Did you mean 'tanglenas_register_spaces'?",
        ),
        ("def tanglenas_register_spaces(registry): pass", "hook of the wrong form"),
        ("def tanglenas_register_spaces(register): register('x', 'no.colon')", "'package.module:Class'"),
        ("def tanglenas_register_spaces(register): register('', 'm:C')", "string that is not empty"),
        ("def tanglenas_register_spaces(register): register('x')", "TypeError"),
        (
            "def tanglenas_register_spaces(register): register('x', 'm:C', **{'name': 'y'})",
            "multiple values for argument 'name'",
        ),
    ],
)
def test_a_mistake_in_a_hook_is_reported_with_the_distribution(site, hook, said_of_it):
    site.install("tanglenas-mistaken", f"from tanglenas_engine import hookimpl\n@hookimpl\n{hook}\n")
    manager, said = load_warned()
    assert len(said) == 1
    assert "tanglenas-mistaken 1.0" in said[0] and said_of_it in said[0]
    assert "x" not in manager.names("space")


def test_a_misspelt_hook_leaves_the_correct_ones_working(site):
    code = SPACE.format(name="theirs", module="tanglenas_theirs")
    site.install(
        "tanglenas-theirs",
        textwrap.dedent(code) + "@hookimpl\ndef tanglenas_registr_optimizers(register):\n    pass\n",
    )
    manager, said = load_warned()
    assert "Did you mean 'tanglenas_register_optimizers'?" in said[0]
    assert manager.resolve("space", "theirs").distribution == "tanglenas-theirs"


def test_a_hook_marked_optional_may_be_one_that_this_version_lacks(site):
    site.install(
        "tanglenas-newer",
        "from tanglenas_engine import hookimpl\n@hookimpl(optionalhook=True)\n"
        "def tanglenas_register_trackers(register):\n    pass\n",
    )
    assert not PluginManager().faults


def test_forgetting_hookimpl_is_reported(site):
    site.install("tanglenas-bare", "def tanglenas_register_spaces(register): register('x', 'm:C')")
    _, said = load_warned()
    assert "tanglenas-bare 1.0" in said[0] and "implements no hook" in said[0] and "hookimpl" in said[0]


def test_a_plugin_for_another_api_version_is_not_loaded(site):
    code = "TANGLENAS_API = 2\n" + textwrap.dedent(SPACE.format(name="theirs", module="m"))
    site.install("tanglenas-future", code)
    manager, said = load_warned()
    assert "theirs" not in manager.names("space")
    assert "tanglenas-future 1.0" in said[0]
    assert "written for plugin API 2, and this TangleNAS has plugin API 1" in said[0]


def test_a_plugin_for_this_api_version_is_loaded(site):
    code = "TANGLENAS_API = 1\n" + textwrap.dedent(SPACE.format(name="theirs", module="m"))
    site.install("tanglenas-today", code)
    assert "theirs" in PluginManager().names("space")


def test_two_distributions_may_use_one_entry_point_name(site):
    site.install_space("tanglenas-alpha", "alpha", entry_point="vit")
    site.install_space("tanglenas-beta", "beta", entry_point="vit")
    assert {"alpha", "beta", "autoformer_t"} <= set(PluginManager().names("space"))


def test_a_name_that_two_distributions_claim_is_refused_and_both_are_named(site):
    site.install_space("tanglenas-beta", "same", version="2.0")
    site.install_space("tanglenas-alpha", "same", version="1.5")
    site.install_space("tanglenas-gamma", "other")
    manager, said = load_warned()
    assert len(said) == 1
    with pytest.raises(TangleNASError) as error:
        manager.create("space", "same")
    for message in (said[0], str(error.value)):
        alpha, beta = message.index("tanglenas-alpha 1.5"), message.index("tanglenas-beta 2.0")
        assert alpha < beta, "the order is that of the names, not of installation"
        assert "TANGLENAS_PLUGINS" in message
    assert manager.create("space", "other").width == 4


def test_a_built_in_name_cannot_be_taken_over_silently(site):
    site.install_space("aaa-first-in-line", "autoformer_t")
    manager, _ = load_warned()
    with pytest.raises(TangleNASError, match=r"aaa-first-in-line 1.0 .* and by tanglenas "):
        manager.resolve("space", "autoformer_t")


@pytest.mark.parametrize("setting", ["tanglenas-alpha", "Tanglenas_Alpha", " alpha ,"])
@pytest.mark.slow
def test_a_subset_is_chosen_by_distribution_or_entry_point(site, monkeypatch, setting):
    site.install_space("tanglenas-alpha", "same", entry_point="alpha")
    site.install_space("tanglenas-beta", "same", entry_point="beta")
    monkeypatch.setenv("TANGLENAS_PLUGINS", setting)
    manager = PluginManager()
    assert [it.distribution for it in manager.registrations()] == ["tanglenas-alpha"]
    assert {it.distribution for it in manager.blocked} >= {"tanglenas", "tanglenas-beta"}


def test_an_empty_subset_loads_nothing_and_the_error_says_so(site, monkeypatch):
    monkeypatch.setenv("TANGLENAS_PLUGINS", "")
    manager = PluginManager()
    assert manager.registrations() == []
    with pytest.raises(TangleNASError, match=r"\(none\)\. TANGLENAS_PLUGINS='' keeps out .*'vit'.*: unset it"):
        manager.resolve("space", "autoformer_t")


def test_a_blocked_plugin_is_not_imported(site, monkeypatch):
    site.install("tanglenas-broken", "import a_module_that_is_not_there")
    monkeypatch.setenv("TANGLENAS_PLUGINS", "tanglenas")
    assert "darts" in PluginManager().names("optimizer")


def test_a_subset_with_a_name_that_is_not_installed_is_refused(site, monkeypatch):
    monkeypatch.setenv("TANGLENAS_PLUGINS", "vit,gradeint")
    with pytest.raises(TangleNASError, match=r"TANGLENAS_PLUGINS.*'gradeint'. Did you mean 'gradient'"):
        PluginManager()


def test_strict_raises_every_fault_and_conflict(site, monkeypatch):
    site.install("tanglenas-broken", "import a_module_that_is_not_there")
    site.install_space("tanglenas-alpha", "same")
    site.install_space("tanglenas-beta", "same")
    monkeypatch.setenv("TANGLENAS_STRICT_PLUGINS", "1")
    with pytest.raises(TangleNASError, match=r"tanglenas-broken 1\.0.*'same' is registered more than once") as error:
        PluginManager()
    assert isinstance(error.value.__cause__, ModuleNotFoundError)
    monkeypatch.setenv("TANGLENAS_STRICT_PLUGINS", "0")
    assert len(load_warned()[1]) == 2


def test_a_half_removed_distribution_does_not_stop_the_others(site):
    site.install_space("tanglenas-theirs", "theirs")
    (site.folder / "tanglenas_theirs-1.0.dist-info" / "METADATA").unlink()
    assert PluginManager().resolve("space", "theirs").distribution == "(unknown)"


def test_an_unknown_option_names_the_closest_and_knows_those_of_the_base_class(site):
    site.install_space("tanglenas-theirs", "theirs")
    manager = PluginManager()
    with pytest.raises(TangleNASError) as error:
        manager.create("space", "theirs", relaxatoin="paper")
    assert str(error.value) == (
        "space 'theirs' of tanglenas-theirs 1.0 (entry point 'theirs') takes no option 'relaxatoin'."
        " Did you mean 'relaxation'? Its options are: depth, num_classes, relaxation, width."
    )
    assert manager.create("space", "theirs", num_classes=3).num_classes == 3


def test_options_of_a_closed_class_do_not_reach_its_base(site):
    site.install(
        "tanglenas-theirs",
        """
        from tanglenas_engine import hookimpl

        class Base:
            def __init__(self, stride=1): ...

        class Closed(Base):
            def __init__(self, depth=1):
                super().__init__()

        class Inherits(Closed): ...

        class Made:
            def __new__(cls, depth=1):
                return super().__new__(cls)

        def function(depth=1): ...

        @hookimpl
        def tanglenas_register_spaces(register):
            for target in (Closed, Inherits, Made, function):
                register(target.__name__, target)
        """,
    )
    manager = PluginManager()
    for name in ("Closed", "Inherits", "Made", "function"):
        manager.create("space", name, depth=2)
        with pytest.raises(TangleNASError, match=r"no option 'stride'.*Its options are: depth\."):
            manager.create("space", name, stride=2)


def test_a_missing_option_is_named(site):
    site.install_space("tanglenas-theirs", "theirs")
    site.write("tanglenas_theirs", SPACE.format(name="theirs", module="tanglenas_theirs").replace(", width=4", ""))
    with pytest.raises(TangleNASError, match=r"needs the option 'width': pass create_space\('theirs', width=...\)"):
        PluginManager().create("space", "theirs")


def test_the_errors_of_a_constructor_pass_unchanged(site):
    site.install_space("tanglenas-theirs", "theirs")
    with pytest.raises(TangleNASError, match=r"^width must be positive$"):
        PluginManager().create("space", "theirs", width=-1)


@pytest.mark.parametrize(
    ("code", "cause"),
    [("import a_module_that_is_not_there", "No module named 'a_module"), ("x = 1", "no attribute 'Space'")],
)
def test_a_target_that_cannot_be_imported_names_its_distribution(site, code, cause):
    site.install_space("tanglenas-theirs", "theirs", version="0.9")
    site.write("tanglenas_theirs_space", code)
    manager = PluginManager()
    with pytest.raises(TangleNASError, match=f"space 'theirs' of tanglenas-theirs 0.9 .*{cause}") as error:
        manager.create("space", "theirs")
    assert isinstance(error.value.__cause__, ImportError | AttributeError)


def test_listing_imports_neither_torch_nor_a_target(site):
    site.install_space("tanglenas-theirs", "theirs")
    code = f"""
import sys
sys.path.insert(0, {str(site.folder)!r})
from tanglenas_engine.plugins import manager
assert manager() is manager()
print(*(it.name for it in manager().registrations("space")))
lazy = {{"torch", "timm", "sklearn", "tanglenas_theirs_space", "tanglenas_vit.autoformer"}}
print(*(lazy & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, imported = run.stdout.splitlines()
    assert {"theirs", "autoformer_t"} <= set(names.split())
    assert imported == ""


def test_every_hook_is_specified_and_hookimpl_is_exported_at_the_top():
    import tanglenas_engine

    specified = {name for name in vars(hookspecs) if name.startswith("tanglenas_register")}
    assert specified == set(hookspecs.HOOKS)
    assert tanglenas_engine.hookimpl is hookimpl
