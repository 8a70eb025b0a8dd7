package dev.signet.test;

import com.nimbusds.jose.util.JSONObjectUtils;
import io.spiffe.provider.SpiffeSslContextFactory;
import io.spiffe.provider.SpiffeSslContextFactory.SslContextOptions;
import io.spiffe.spiffeid.SpiffeId;
import io.spiffe.svid.jwtsvid.JwtSvid;
import io.spiffe.svid.x509svid.X509Svid;
import io.spiffe.workloadapi.DefaultJwtSource;
import io.spiffe.workloadapi.DefaultWorkloadApiClient;
import io.spiffe.workloadapi.DefaultX509Source;
import io.spiffe.workloadapi.JwtSource;
import io.spiffe.workloadapi.JwtSourceOptions;
import io.spiffe.workloadapi.WorkloadApiClient;
import io.spiffe.workloadapi.Watcher;
import io.spiffe.workloadapi.X509Context;
import io.spiffe.workloadapi.X509Source;
import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.net.InetAddress;
import java.nio.charset.StandardCharsets;
import java.security.cert.Certificate;
import java.security.cert.CertificateEncodingException;
import java.security.cert.X509Certificate;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Base64;
import java.util.Collection;
import java.util.HashSet;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import java.util.logging.Level;
import java.util.logging.Logger;
import java.util.stream.Collectors;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLServerSocket;
import javax.net.ssl.SSLSocket;

/**
 * A workload in Java, on java-spiffe-core and java-spiffe-provider.
 *
 * <p>The commands, and the JSON lines that they print, are described in program_test.go of
 * test/clients; every language has the same. SPIFFE_ENDPOINT_SOCKET says where the Workload API is.
 */
public final class Client {
    /** For what should take a second. */
    private static final Duration PATIENCE = Duration.ofSeconds(20);

    private Client() {}

    public static void main(String[] args) {
        Logger.getLogger("").setLevel(Level.WARNING);
        int code = 0;
        try {
            run(args);
        } catch (Exception e) {
            say("error", text(e));
            code = 1;
        }
        System.exit(code); // sources have threads that nobody waits for any more
    }

    private static void run(String[] args) throws Exception {
        switch (args[0]) {
            case "fetch" -> fetch();
            case "watch" -> watch(Integer.parseInt(args[1]));
            case "serve" -> serve(args);
            case "dial" -> dialEach();
            case "jwt" -> jwt(args[1]);
            case "validate" -> validate();
            default -> throw new IllegalArgumentException("no command " + args[0]);
        }
    }

    /** Prints a line of names and values. */
    private static synchronized void say(Object... pairs) {
        Map<String, Object> line = new LinkedHashMap<>();
        for (int i = 0; i < pairs.length; i += 2) {
            line.put((String) pairs[i], pairs[i + 1]);
        }
        System.out.println(JSONObjectUtils.toJSONString(line));
    }

    /** The error and its causes, in one line. */
    private static String text(Throwable e) {
        StringBuilder out = new StringBuilder();
        for (; e != null; e = e.getCause()) {
            out.append(out.isEmpty() ? "" : ": ").append(e.getClass().getSimpleName()).append(": ").append(e.getMessage());
        }
        return out.toString();
    }

    private static String der(Certificate cert) throws CertificateEncodingException {
        return Base64.getEncoder().encodeToString(cert.getEncoded());
    }

    private static List<String> ders(Collection<X509Certificate> certs) throws CertificateEncodingException {
        List<String> out = new ArrayList<>();
        for (X509Certificate c : certs) {
            out.add(der(c));
        }
        return out;
    }

    private static X509Source x509Source() throws Exception {
        return DefaultX509Source.newSource(DefaultX509Source.X509SourceOptions.builder().initTimeout(PATIENCE).build());
    }

    private static void fetch() throws Exception {
        try (WorkloadApiClient client = DefaultWorkloadApiClient.newClient()) {
            X509Context context = client.fetchX509Context();
            X509Svid svid = context.getDefaultSvid();
            var bundle = context.getX509BundleSet().getBundleForTrustDomain(svid.getSpiffeId().getTrustDomain());
            say("id", svid.getSpiffeId().toString(), "chain", ders(svid.getChain()), "roots", ders(bundle.getX509Authorities()));
        }
    }

    private static void watch(int wanted) throws Exception {
        CountDownLatch done = new CountDownLatch(wanted);
        List<String> gaps = new ArrayList<>();
        int polls = 0;
        try (X509Source source = x509Source();
                WorkloadApiClient client = DefaultWorkloadApiClient.newClient()) {
            client.watchX509Context(new Watcher<>() {
                private final Set<X509Certificate> seen = new HashSet<>();

                @Override
                public void onUpdate(X509Context update) {
                    X509Certificate leaf = update.getDefaultSvid().getLeaf();
                    if (!seen.add(leaf)) {
                        return;
                    }
                    try {
                        say("leaf", der(leaf));
                    } catch (CertificateEncodingException e) {
                        say("error", text(e));
                    }
                    done.countDown();
                }

                @Override
                public void onError(Throwable e) {
                    say("error", text(e));
                }
            });
            while (!done.await(20, TimeUnit.MILLISECONDS)) {
                polls++;
                try {
                    source.getX509Svid().getLeaf().checkValidity();
                } catch (Exception e) {
                    gaps.add(text(e));
                }
            }
        }
        say("polls", polls, "gaps", gaps);
    }

    /** A context for connections with peers of these identities. */
    private static SSLContext context(X509Source source, String ids) throws Exception {
        Set<SpiffeId> accepted = Arrays.stream(ids.split(",")).map(SpiffeId::parse).collect(Collectors.toSet());
        return SpiffeSslContextFactory.getSslContext(
                SslContextOptions.builder().sslProtocol("TLSv1.3").x509Source(source).acceptedSpiffeIdsSupplier(() -> accepted).build());
    }

    private static String peer(SSLSocket socket) throws Exception {
        return der(socket.getSession().getPeerCertificates()[0]);
    }

    private static void serve(String[] args) throws Exception {
        try (X509Source source = x509Source()) {
            for (int i = 1; i < args.length; i += 2) {
                String[] hostPort = args[i].split(":");
                SSLServerSocket listener = (SSLServerSocket) context(source, args[i + 1]).getServerSocketFactory()
                        .createServerSocket(Integer.parseInt(hostPort[1]), 50, InetAddress.getByName(hostPort[0]));
                listener.setNeedClientAuth(true);
                String address = hostPort[0] + ":" + listener.getLocalPort();
                say("listening", address);
                daemon(() -> accept(listener, address));
            }
            System.in.readAllBytes(); // until the test ends
        }
    }

    private static void daemon(Runnable what) {
        Thread thread = new Thread(what);
        thread.setDaemon(true);
        thread.start();
    }

    private static void accept(SSLServerSocket listener, String address) {
        while (true) {
            try {
                SSLSocket socket = (SSLSocket) listener.accept();
                daemon(() -> serveOne(socket, address));
            } catch (IOException e) {
                say("error", text(e));
                return;
            }
        }
    }

    private static void serveOne(SSLSocket socket, String address) {
        try (socket) {
            socket.startHandshake();
            String leaf = peer(socket);
            socket.getOutputStream().write("hello".getBytes(StandardCharsets.US_ASCII));
            say("server", address, "leaf", leaf);
        } catch (Exception e) {
            say("server", address, "error", text(e));
        }
    }

    private static void dialEach() throws Exception {
        try (X509Source source = x509Source()) {
            for (String[] words : new Lines()) {
                String[] hostPort = words[0].split(":");
                // A context remembers its sessions. A connection that resumes one is as good as the
                // certificates of the first, so each has a context of its own here.
                try (SSLSocket socket = (SSLSocket) context(source, words[1]).getSocketFactory()
                        .createSocket(hostPort[0], Integer.parseInt(hostPort[1]))) {
                    socket.startHandshake();
                    String leaf = peer(socket);
                    say("leaf", leaf, "got", new String(socket.getInputStream().readAllBytes(), StandardCharsets.US_ASCII));
                } catch (Exception e) {
                    say("error", text(e));
                }
            }
        }
    }

    private static void jwt(String audience) throws Exception {
        try (WorkloadApiClient client = DefaultWorkloadApiClient.newClient()) {
            JwtSvid svid = client.fetchJwtSvid(audience);
            say("id", svid.getSpiffeId().toString(), "token", svid.getToken());
        }
    }

    private static void validate() throws Exception {
        try (WorkloadApiClient client = DefaultWorkloadApiClient.newClient();
                JwtSource source = DefaultJwtSource.newSource(JwtSourceOptions.builder().initTimeout(PATIENCE).build())) {
            for (String[] words : new Lines()) {
                List<Object> answer = new ArrayList<>();
                try {
                    answer.addAll(List.of("agent", client.validateJwtSvid(words[0], words[1]).getSpiffeId().toString()));
                } catch (Exception e) {
                    answer.addAll(List.of("agentError", text(e)));
                }
                try {
                    JwtSvid svid = JwtSvid.parseAndValidate(words[0], source, Set.of(words[1]));
                    answer.addAll(List.of("local", svid.getSpiffeId().toString()));
                } catch (Exception e) {
                    answer.addAll(List.of("localError", text(e)));
                }
                say(answer.toArray());
            }
        }
    }

    /** The lines of standard input, each as its words. */
    private static final class Lines implements Iterable<String[]> {
        @Override
        public java.util.Iterator<String[]> iterator() {
            return new BufferedReader(new InputStreamReader(System.in, StandardCharsets.US_ASCII)).lines().map(l -> l.split(" ")).iterator();
        }
    }
}
