"""An exported folder on the hub: whether it can be sent is asked before the work, sent after it."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from megaskip.config.commands.hub import HubTarget
from megaskip.errors import ConfigError, MegaskipError, first_line

_HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
"""Of the library beneath, which is another one in other versions: what is raised for a network that
does not answer."""
_NOT_ALLOWED = (401, 403)


def require_hub(target: HubTarget) -> None:
    """Raise ConfigError when a folder could not be sent to --push_to_hub: a name that the hub does
    not take, no network, no login, or a namespace of others. Does nothing without the flag."""
    name = target.push_to_hub
    if name is None:
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--push_to_hub {name}: {_why(error)}") from None
    if constants.is_offline_mode():
        raise ConfigError(
            f"--push_to_hub {name}: HF_HUB_OFFLINE is set; unset it, or leave the flag out"
        )
    user = _user(name)
    own = {user["name"], *(org["name"] for org in user.get("orgs", ()))}
    if "/" in name and name.split("/")[0] not in own:
        raise ConfigError(
            f"--push_to_hub {name}: {user['name']!r} is logged in, and may write to "
            f"{', '.join(sorted(own))}; name one of these in front of the slash"
        )


def push_to_hub(folder: Path, target: HubTarget) -> str | None:
    """Send a folder as a commit to --push_to_hub, which is made where it is missing; return its
    address, None without the flag. Raises MegaskipError, after which the folder is still there."""
    name = target.push_to_hub
    if name is None:
        return None
    api = HfApi()
    try:
        # Whether others see it is asked for where it is new; what exists keeps what it has.
        made = api.create_repo(name, private=not target.hub_public, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message="Upload from megaskip"
        )
    except (OSError, HFValidationError, _HTTP_ERROR) as error:
        raise MegaskipError(
            f"--push_to_hub {name}: the hub did not take it ({_why(error)}); {folder} is "
            f"whole: send it with `hf upload {name} {folder}`"
        ) from None
    return str(made)


def _user(name: str) -> dict[str, Any]:
    """Return what the hub says of who is logged in."""
    try:
        return HfApi().whoami()
    except (OSError, _HTTP_ERROR) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, LocalTokenNotFoundError) or status in _NOT_ALLOWED:
            raise ConfigError(
                f"--push_to_hub {name}: not logged in ({_why(error)}); run `hf auth login` "
                "with a token that may write, or set HF_TOKEN"
            ) from None
        raise ConfigError(
            f"--push_to_hub {name}: the hub does not answer ({_why(error)}); check the "
            "network, or leave the flag out"
        ) from None


def _why(error: Exception) -> str:
    return first_line(error).rstrip(".")
