"""`forebay completion SHELL`: a script that completes commands and their flags."""

from __future__ import annotations

import argparse

from forebay_cli.__main__ import COMMANDS, parser

_BASH = """\
_forebay() {{
  local words current="${{COMP_WORDS[COMP_CWORD]}}"
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{commands}"
  else
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
  fi
  case "$current" in
    -*|'') ;;
    *) [ "$COMP_CWORD" -eq 1 ] || words= ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _forebay forebay
"""


class Settings(argparse.Namespace):
    """The command's arguments."""

    shell: str


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    command.add_argument(
        "shell",
        choices=("bash", "zsh", "fish"),
        help='for example: eval "$(forebay completion bash)", or forebay completion fish | source',
    )


def run(settings: Settings) -> int:
    """Print the script."""
    flags = _flags()
    if settings.shell == "fish":
        script = _fish(flags)
    else:
        cases = "\n".join(
            f'      {name}) words="{" ".join(flags[name])}" ;;' for name in COMMANDS if flags[name]
        )
        script = _BASH.format(commands=" ".join(COMMANDS), cases=cases)
        if settings.shell == "zsh":
            script = f"autoload -U +X bashcompinit && bashcompinit\n{script}"
    print(script, end="")  # noqa: T201  # what was asked for
    return 0


def _flags() -> dict[str, list[str]]:
    """Return the flags of every command."""
    (commands,) = (
        action
        for action in parser(*COMMANDS)._actions  # noqa: SLF001  # argparse has no other way
        if isinstance(action, argparse._SubParsersAction)  # noqa: SLF001
    )
    return {
        name: sorted(
            flag
            for action in command._actions  # noqa: SLF001
            for flag in action.option_strings
            if flag.startswith("--")
        )
        for name, command in commands.choices.items()
    }


def _fish(flags: dict[str, list[str]]) -> str:
    lines = ["complete -c forebay -n __fish_use_subcommand -f"]
    for name, text in COMMANDS.items():
        lines.append(f"complete -c forebay -n __fish_use_subcommand -f -a {name} -d '{text}'")
        lines += [
            f"complete -c forebay -n '__fish_seen_subcommand_from {name}' -l {flag[2:]}"
            for flag in flags[name]
        ]
    return "\n".join(lines) + "\n"
