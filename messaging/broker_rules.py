"""What a mosquitto of production is configured by: who connects, who may say what, what it keeps.

A client is its certificate: the common name is its user name and its client id, so that nobody can
evict another, and a device may write below its own topics alone. What waits for one client is
bounded by 128 MiB, the thousand chunks that an aggregator counts on by default (``broker_queue``):
who subscribes and does not read fills no memory. Whoever lets more be in flight raises it too.
"""

from __future__ import annotations

from messaging import topics

AGGREGATOR = "aggregator"  # the user that may read and write everything of every run

_CONFIG = """\
# Written by `pwff certs`; paths are those of the machine that the broker runs on.
listener {port}
cafile {folder}/ca.pem
certfile {folder}/broker.pem
keyfile {folder}/broker.key
tls_version tlsv1.2
require_certificate true
use_identity_as_username true
use_username_as_clientid true
allow_anonymous false
acl_file {folder}/acl

max_queued_messages 100000
max_queued_bytes 134217728
max_packet_size 300000
max_keepalive 300
set_tcp_nodelay true
persistent_client_expiration 1d

persistence true
persistence_location {data}/
autosave_on_changes true
autosave_interval 1

log_type error
log_type warning
log_type notice
"""


LOGS_ALL = "log_type debug"
_DENIALS = f"""\
# Publishing that is denied is among what is for debugging: four lines for every message passed on.
{LOGS_ALL}
"""


def mosquitto_config(port: int, folder: str, data: str, *, denials: bool = False) -> str:
    """Return mosquitto.conf.

    Args:
        port: To listen on, all addresses.
        folder: With ca.pem, broker.pem, broker.key and acl, on the broker's machine.
        data: Where the broker keeps what must outlive it.
        denials: Whether its log has the messages that access rules deny, and all others too.
    """
    return _CONFIG.format(port=port, folder=folder, data=data) + (_DENIALS if denials else "")


def access_rules() -> str:
    """Return the access control list: ``%u`` is the common name of a client's certificate."""
    mine = topics.state("+", "%u").removesuffix("/state")
    return (
        "# Written by `pwff certs`. Every run of this broker, every device its own topics.\n"
        f"user {AGGREGATOR}\n"
        "topic readwrite pwff/#\n"
        "\n"
        f"pattern write {mine}/up/#\n"
        f"pattern write {mine}/state\n"
        f"pattern read {mine}/down/#\n"
        f"pattern read {topics.manifest('+').removesuffix('/latest')}/#\n"
    )
