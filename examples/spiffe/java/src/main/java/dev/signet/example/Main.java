package dev.signet.example;

import io.spiffe.provider.SpiffeSslContextFactory;
import io.spiffe.provider.SpiffeSslContextFactory.SslContextOptions;
import io.spiffe.spiffeid.SpiffeId;
import io.spiffe.workloadapi.DefaultX509Source;
import io.spiffe.workloadapi.X509Source;
import java.io.BufferedReader;
import java.io.EOFException;
import java.io.InputStreamReader;
import java.net.InetAddress;
import java.nio.charset.StandardCharsets;
import java.security.cert.X509Certificate;
import java.util.List;
import java.util.Set;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLServerSocket;
import javax.net.ssl.SSLSocket;

/**
 * A server and a client of mutual TLS by SPIFFE, with java-spiffe. Each says whom it wants at the
 * other end, and follows renewals. SPIFFE_ENDPOINT_SOCKET says where the agent is.
 *
 * <pre>
 * serve 127.0.0.1:8443 spiffe://mesh.example/ns/pay/sa/billing  says hello to that client
 * call 127.0.0.1:8443 spiffe://mesh.example/ns/pay/sa/ledger    prints what that server says, each second
 * </pre>
 */
public final class Main {
    /** The kind of a URI among a certificate's names. */
    private static final Integer URI = 6;

    private Main() {}

    public static void main(String[] args) throws Exception {
        if (args.length != 3 || !Set.of("serve", "call").contains(args[0])) {
            System.err.println("usage: serve|call ADDRESS SPIFFE-ID");
            System.exit(2);
        }
        int colon = args[1].lastIndexOf(':');
        InetAddress host = InetAddress.getByName(args[1].substring(0, colon));
        int port = Integer.parseInt(args[1].substring(colon + 1));
        SpiffeId peer = SpiffeId.parse(args[2]);
        try (X509Source source = DefaultX509Source.newSource()) { // holds the newest certificate and roots
            if (args[0].equals("serve")) {
                serve(source, host, port, peer);
            }
            while (true) {
                call(source, host, port, peer);
                Thread.sleep(1000);
            }
        }
    }

    /** What a connection with this peer needs. */
    private static SSLContext context(X509Source source, SpiffeId peer) throws Exception {
        return SpiffeSslContextFactory.getSslContext(SslContextOptions.builder()
                .sslProtocol("TLSv1.3").x509Source(source).acceptedSpiffeIdsSupplier(() -> Set.of(peer)).build());
    }

    private static void serve(X509Source source, InetAddress host, int port, SpiffeId client) throws Exception {
        SSLContext context = context(source, client);
        // A connection that resumes a TLS session is as good as the certificates of the first: not for long.
        context.getServerSessionContext().setSessionTimeout(60);
        try (SSLServerSocket listener = (SSLServerSocket) context.getServerSocketFactory().createServerSocket(port, 50, host)) {
            listener.setNeedClientAuth(true);
            System.out.println("listening on " + host.getHostAddress() + ":" + listener.getLocalPort());
            while (true) {
                SSLSocket socket = (SSLSocket) listener.accept();
                Thread thread = new Thread(() -> greet(socket));
                thread.setDaemon(true);
                thread.start();
            }
        }
    }

    private static void greet(SSLSocket socket) {
        try (socket) {
            socket.setSoTimeout(10_000);
            socket.startHandshake();
            String hello = "hello " + idOf(socket) + "\n";
            socket.getOutputStream().write(hello.getBytes(StandardCharsets.UTF_8));
        } catch (Exception e) {
            System.err.println("refused: " + e);
        }
    }

    /** The SPIFFE ID in the peer's certificate, which has been verified. */
    private static String idOf(SSLSocket socket) throws Exception {
        X509Certificate cert = (X509Certificate) socket.getSession().getPeerCertificates()[0];
        for (List<?> name : cert.getSubjectAlternativeNames()) {
            if (name.get(0).equals(URI)) {
                return (String) name.get(1);
            }
        }
        throw new IllegalStateException("the certificate names no SPIFFE ID");
    }

    private static void call(X509Source source, InetAddress host, int port, SpiffeId server) throws Exception {
        // A context of its own, so that no session is resumed.
        try (SSLSocket socket = (SSLSocket) context(source, server).getSocketFactory().createSocket(host, port)) {
            socket.startHandshake();
            BufferedReader in = new BufferedReader(new InputStreamReader(socket.getInputStream(), StandardCharsets.UTF_8));
            String line = in.readLine();
            if (line == null) {
                throw new EOFException("the server says nothing");
            }
            System.out.println(line);
        }
    }
}
