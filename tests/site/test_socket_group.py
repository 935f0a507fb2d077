"""The worker's socket and token are its owner's alone, or a named group's as well, and never the world's."""

import grp
import os

import pytest

from fedloom.errors import SiteError
from fedloom.site.worker import _listening, own_token

GROUP = grp.getgrgid(os.getgid()).gr_name


def mode(path):
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize(("group", "token", "socket"), [(None, 0o600, 0o600), (GROUP, 0o640, 0o660)])
def test_modes_of_token_and_socket(tmp_path, group, token, socket):
    secret = own_token(tmp_path / "token", group)
    assert len(secret) == 64 and mode(tmp_path / "token") == token
    assert own_token(tmp_path / "token", group) == secret
    with _listening(tmp_path / "socket", group):
        assert mode(tmp_path / "socket") == socket


@pytest.mark.parametrize(("group", "open_to"), [(None, 0o640), (GROUP, 0o644), (GROUP, 0o660)])
def test_a_token_that_others_may_read_or_write_is_refused(tmp_path, group, open_to):
    own_token(tmp_path / "token", group)
    (tmp_path / "token").chmod(open_to)
    with pytest.raises(SiteError, match="chmod"):
        own_token(tmp_path / "token", group)


def test_an_unknown_group_is_named(tmp_path):
    with pytest.raises(SiteError, match="no-such-group"):
        own_token(tmp_path / "token", "no-such-group")
