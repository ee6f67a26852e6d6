"""The boot loader of a host: what GRUB makes of the configuration that NixOS writes for it, and of its environment block.

The block is GRUB's own format, so that the host's grub-editenv can change it.
"""

import re

SIZE = 1024


def entries(directory):
    """What can be booted, in the order of the menu: the titles that lead there, and the system."""
    config = directory / "grub.cfg"
    path, found = [], []
    for line in config.read_text().splitlines() if config.exists() else ():
        words = line.strip()
        if words.endswith("{"):
            title = re.match(r'(?:menuentry|submenu) "(.*?)"', words)
            path.append(title.group(1).replace(">", ">>") if title else "")
        elif words == "}":
            path.pop()
        elif words.startswith("linux "):
            found.append((">".join(path), re.search(r" init=(\S+)/init", words).group(1)))
    return found


def take_next_entry(directory):
    """What is to be booted once; it is not, the next time."""
    file = directory / "grubenv"
    block = file.read_text() if file.exists() else ""
    armed = re.search(r"^next_entry=(.+)\n", block, re.MULTILINE)
    if not armed:
        return ""
    block = block.replace(armed.group(0), "next_entry=\n").rstrip("#")
    # in place, as GRUB does it
    with open(file, "r+") as place:
        place.write(block.ljust(SIZE, "#"))
    return re.sub(r"\\(.)", r"\1", armed.group(1))


def next_boot(directory, choose=None, bad=()):
    """The system that is booted; none before NixOS has been installed. `choose` is one that is chosen in the menu, `bad`
    are those that the loader does not boot by itself any more."""
    menu, once = entries(directory), take_next_entry(directory)
    if choose:
        return next(system for _, system in menu if system == choose)
    fits = [system for title, system in menu if title == once] + [system for _, system in menu if system not in bad]
    return next(iter(fits), None)
