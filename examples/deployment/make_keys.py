"""Makes the keys of a federation, once, on one machine: who carries which file where is in docs/deployment.md.

    python make_keys.py keys --host fl.example.org --sites hospital-a hospital-b hospital-c

writes ``ca.pem`` (for all), ``server.pem`` and ``server.key`` (for the SuperLink), ``secret`` (for the SuperLink and
the server's script), and for each site its private key, ``hospital-a.key``, and the public half, ``hospital-a.pub``.
"""

import argparse
import datetime
import ipaddress
import os
import secrets
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

YEARS = 2


def certificate(name, key, issuer, issuer_key, hosts=()):
    """Make a certificate for a key, signed by the issuer's; without hosts that of an authority."""
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=5)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=365 * YEARS))
        .add_extension(x509.BasicConstraints(ca=not hosts, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if hosts:  # the name that sites and server write in front of the port has to be one of these
        builder = builder.add_extension(x509.SubjectAlternativeName([alternative(host) for host in hosts]), False)
    return builder.sign(issuer_key, hashes.SHA256())


def alternative(host):
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def private(key, form):
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def write(path, content, mode=0o644):
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)  # never over a key that is there
    with open(descriptor, "wb") as file:
        file.write(content)


def make_keys(folder, hosts, sites):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pem = serialization.Encoding.PEM
    # The authority signs the SuperLink's certificate, and its key is thrown away: for a new one all is made anew.
    authority = ec.generate_private_key(ec.SECP256R1())
    root = certificate("federation", authority, None, authority)
    server = ec.generate_private_key(ec.SECP256R1())
    signed = certificate(hosts[0], server, root.subject, authority, hosts)
    write(folder / "ca.pem", root.public_bytes(pem))
    write(folder / "server.pem", signed.public_bytes(pem))
    write(folder / "server.key", private(server, serialization.PrivateFormat.PKCS8), 0o600)
    write(folder / "secret", secrets.token_hex(32).encode(), 0o600)
    for site in sites:
        key = ec.generate_private_key(ec.SECP384R1())
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        write(folder / f"{site}.key", private(key, serialization.PrivateFormat.OpenSSH), 0o600)
        write(folder / f"{site}.pub", public + b"\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument(
        "--host", nargs="+", required=True, help="names or IP addresses by which the SuperLink is reached"
    )
    parser.add_argument("--sites", nargs="+", required=True)
    arguments = parser.parse_args()
    make_keys(arguments.folder, arguments.host, arguments.sites)
