"""A workload in Python, on the libraries spiffe and spiffe-tls.

The commands, and the JSON lines that they print, are described in
../program_test.go; every language has the same. SPIFFE_ENDPOINT_SOCKET says where
the Workload API is.
"""

import base64
import datetime
import json
import os
import socket
import sys
import threading

from OpenSSL import SSL
from cryptography.hazmat.primitives.serialization import Encoding
from spiffe import JwtSource, JwtSvid, SpiffeId, WorkloadApiClient, X509Source
from spiffetls import create_ssl_context, dial
from spiffetls.tlsconfig.authorize import authorize_id, authorize_one_of

PATIENCE = 20  # seconds for what should take one
_printing = threading.Lock()


def say(**line):
    with _printing:
        print(json.dumps(line), flush=True)


def der(cert):
    return base64.b64encode(cert.public_bytes(Encoding.DER)).decode()


def peer(conn):
    return der(conn.get_peer_certificate().to_cryptography())


def fetch():
    with WorkloadApiClient() as client:
        context = client.fetch_x509_context(timeout=PATIENCE)
    svid = context.default_svid
    bundle = context.x509_bundle_set.get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
    say(
        id=str(svid.spiffe_id),
        chain=[der(c) for c in svid.cert_chain],
        roots=[der(c) for c in bundle.x509_authorities],
    )


def watch(wanted):
    source = X509Source(timeout_in_seconds=PATIENCE)
    seen = set()
    done = threading.Event()

    def update():
        leaf = source.get_x509_context().default_svid.leaf
        if leaf.serial_number not in seen:
            seen.add(leaf.serial_number)
            say(leaf=der(leaf))
            if len(seen) == wanted:
                done.set()

    source.subscribe_for_updates(update)
    update()
    polls, gaps = 0, []
    while not done.wait(0.02):
        polls += 1
        try:
            leaf = source.get_x509_context().default_svid.leaf
            now = datetime.datetime.now(datetime.timezone.utc)
            if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
                gaps.append(f'{leaf.serial_number} at {now}')
        except Exception as err:
            gaps.append(str(err))
    say(polls=polls, gaps=gaps)


def serve_one(address, conn):
    try:
        conn.do_handshake()
        leaf = peer(conn)
        conn.sendall(b'hello')
        conn.shutdown()
        say(server=address, leaf=leaf)
    except Exception as err:
        say(server=address, error=f'{type(err).__name__}: {err}')
    finally:
        conn.close()


def serve(pairs):
    source = X509Source(timeout_in_seconds=PATIENCE)
    for address, ids in zip(pairs[::2], pairs[1::2]):
        listen(source, address, ids)
    sys.stdin.read()  # until the test ends


def listen(source, address, ids):
    """Serves on an address, each connection with the newest certificate.

    The library's own listen() is for a process that ends before its certificate
    does. It changes the context that its connections have: pyOpenSSL 26.2 and
    later refuse that, so it goes on with the certificate that has expired; with
    earlier ones it sends the intermediate once more after every rotation, which
    the Java library refuses.
    """
    authorize = authorize_one_of({SpiffeId(i) for i in ids.split(',')})
    context = None

    def renew():
        nonlocal context
        context = create_ssl_context(
            SSL.TLS_SERVER_METHOD, source, authorize, SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT
        )

    source.subscribe_for_updates(renew)
    renew()
    host, port = address.split(':')
    listener = socket.create_server((host, int(port)))
    address = f'{host}:{listener.getsockname()[1]}'

    def accept():
        while True:
            conn = SSL.Connection(context, listener.accept()[0])
            conn.set_accept_state()
            threading.Thread(target=serve_one, args=(address, conn), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    say(listening=address)


def dial_each():
    source = X509Source(timeout_in_seconds=PATIENCE)
    for line in sys.stdin:
        address, expected = line.split()
        conn = None
        try:
            conn = dial(address, source, authorize_fn=authorize_id(SpiffeId(expected)))
            say(leaf=peer(conn), got=conn.recv(100).decode())
        except Exception as err:
            say(error=f'{type(err).__name__}: {err}')
        finally:
            if conn is not None:
                conn.close()


def jwt(audience):
    with WorkloadApiClient() as client:
        svid = client.fetch_jwt_svid({audience}, timeout=PATIENCE)
    say(id=str(svid.spiffe_id), token=svid.token)


def validate():
    client = WorkloadApiClient()
    source = JwtSource(timeout_in_seconds=PATIENCE)
    own = client.fetch_x509_svid(timeout=PATIENCE).spiffe_id.trust_domain
    for line in sys.stdin:
        token, audience = line.split()
        answer = {}
        try:
            answer['agent'] = str(client.validate_jwt_svid(token, audience, timeout=PATIENCE).spiffe_id)
        except Exception as err:
            answer['agentError'] = f'{type(err).__name__}: {err}'
        try:
            bundle = source.get_bundle_for_trust_domain(own)
            answer['local'] = str(JwtSvid.parse_and_validate(token, bundle, {audience}).spiffe_id)
        except Exception as err:
            answer['localError'] = f'{type(err).__name__}: {err}'
        say(**answer)


def main(command, *args):
    match command:
        case 'fetch':
            fetch()
        case 'watch':
            watch(int(args[0]))
        case 'serve':
            serve(args)
        case 'dial':
            dial_each()
        case 'jwt':
            jwt(args[0])
        case 'validate':
            validate()
        case _:
            raise ValueError(f'no command {command}')


if __name__ == '__main__':
    code = 0
    try:
        main(*sys.argv[1:])
    except Exception as err:
        say(error=f'{type(err).__name__}: {err}')
        code = 1
    sys.stdout.flush()
    os._exit(code)  # the sources' threads have nothing to say any more
