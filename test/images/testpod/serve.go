package main

import (
	"context"
	"errors"
	"flag"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// serve answers HTTP (/id: the pod's name; /healthz), echoes TCP, answers gRPC's
// health protocol, and, if a port is given for it, HTTPS with mutual TLS.
func serve(ctx context.Context, args []string, early done) error {
	f := flag.NewFlagSet("serve", flag.ContinueOnError)
	port := f.String("port", defaultPort, "HTTP port")
	echoPort := f.Int("echo-port", 0, "port of the TCP echo (default: HTTP port + 1)")
	grpcPort := f.Int("grpc-port", 0, "port of gRPC health (default: HTTP port + 2)")
	tlsPort := f.Int("tls-port", 0, "port of HTTPS with mutual TLS (default: none)")
	f.Bool("first-instruction", false, "listen for HTTP before anything else")
	if _, err := parse(f, args); err != nil {
		return err
	}
	number, err := strconv.ParseUint(*port, 10, 16)
	if err != nil {
		return errors.New("--port: must be a number up to 65535")
	}
	if *echoPort == 0 {
		*echoPort = int(number) + 1
	}
	if *grpcPort == 0 {
		*grpcPort = int(number) + 2
	}
	web, err := early.listener, early.err
	if web == nil && err == nil {
		web, err = net.Listen("tcp", net.JoinHostPort("", *port))
	}
	if err != nil {
		return err
	}
	echoes, err := net.Listen("tcp", net.JoinHostPort("", strconv.Itoa(*echoPort)))
	if err != nil {
		return err
	}
	rpc, err := net.Listen("tcp", net.JoinHostPort("", strconv.Itoa(*grpcPort)))
	if err != nil {
		return err
	}
	var secure net.Listener
	if *tlsPort != 0 {
		if secure, err = net.Listen("tcp", net.JoinHostPort("", strconv.Itoa(*tlsPort))); err != nil {
			return err
		}
	}

	id := identity()
	mux := http.NewServeMux()
	mux.HandleFunc("/id", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, id+"\n") })
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") })
	hs := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	gs := grpc.NewServer()
	healthpb.RegisterHealthServer(gs, health.NewServer())
	es := &echoServer{conns: map[net.Conn]bool{}}

	ctx, end := context.WithCancel(ctx)
	defer end()
	failed := make(chan error, 4)
	var wait sync.WaitGroup
	wait.Go(func() { failed <- hs.Serve(web) })
	wait.Go(func() { failed <- gs.Serve(rpc) })
	wait.Go(func() { failed <- es.serve(echoes) })
	if secure != nil {
		wait.Go(func() { failed <- serveTLS(ctx, secure, id) })
	}
	printLine(map[string]any{"serving": id, "http": web.Addr().String(), "echo": echoes.Addr().String(), "grpc": rpc.Addr().String()})
	select {
	case <-ctx.Done():
		err = nil
	case err = <-failed:
	}
	end()
	_ = hs.Close()
	gs.Stop()
	es.close(echoes)
	wait.Wait()
	return err
}

// echoServer sends back what it gets.
type echoServer struct {
	wait   sync.WaitGroup
	mu     sync.Mutex
	conns  map[net.Conn]bool // guarded by mu
	closed bool              // guarded by mu
}

func (s *echoServer) serve(l net.Listener) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		s.mu.Lock()
		if s.closed {
			_ = c.Close()
			s.mu.Unlock()
			continue
		}
		s.conns[c] = true
		s.wait.Go(func() {
			_, _ = io.Copy(c, c)
			_ = c.Close()
			s.mu.Lock()
			delete(s.conns, c)
			s.mu.Unlock()
		})
		s.mu.Unlock()
	}
}

// close ends the listener and what it accepted, and waits.
func (s *echoServer) close(l net.Listener) {
	_ = l.Close()
	s.mu.Lock()
	s.closed = true
	for c := range s.conns {
		_ = c.Close()
	}
	s.mu.Unlock()
	s.wait.Wait()
}
