"""`nexus-plugins`: what is installed."""

from __future__ import annotations

import click

from nexus_core.cli.errors import reported

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="nexus-trainer", prog_name="nexus-plugins")
def main() -> None:
    """Look at the plugins that are installed."""


@main.command(name="list")
def list_() -> None:
    """Every installed plugin with its slot, distribution and purpose; a broken one with why."""
    with reported(debug=False):
        from nexus_core.errors import PluginError
        from nexus_core.registry import distribution, installed, load

        entries = installed()
        width = max(map(len, entries), default=0) + 2
        for name, entry in entries.items():
            try:
                plugin = load(name)
                purpose = (plugin.__doc__ or "").strip().partition("\n")[0]
                slot = f"[{plugin.slot}] " if plugin.slot else ""
            except PluginError as error:
                slot, purpose = "", click.style(f"BROKEN: {error}", fg="red")
            click.echo(f"{name:<{width}}{slot}{purpose} ({distribution(entry)})")


@main.command()
@click.argument("name")
def show(name: str) -> None:
    """One plugin: its settings, the hooks it answers, its constraints on order."""
    with reported(debug=False):
        from nexus_core.registry import HOOK_NAMES, load

        plugin = load(name)
        click.echo(f"{name}: {(plugin.__doc__ or '').strip()}\n\nsettings")
        for key, field in plugin.config_class.model_fields.items():
            default = "required" if field.is_required() else f"= {field.get_default()}"
            click.echo(f"  {key} {default}: {field.description or ''}")
        hooks = [hook for hook in HOOK_NAMES if hasattr(plugin, hook)]
        click.echo(f"\nhooks      {', '.join(hooks)}")
        for rule in ("slot", "before", "after", "requires", "conflicts"):
            value = getattr(plugin, rule)
            if value:
                click.echo(f"{rule:<10} {value if isinstance(value, str) else ', '.join(value)}")
