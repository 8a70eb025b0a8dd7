package federation

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"golang.org/x/net/netutil"
)

// Bounds of what strangers can take up.
const (
	maxConns     = 256
	headerTime   = 5 * time.Second
	answerTime   = 10 * time.Second
	idleTime     = 30 * time.Second
	maxHeaders   = 8 << 10
	shutdownTime = 2 * time.Second
)

// Path is where the bundle is.
const Path = "/bundle"

// ServeHTTP answers GET with the document. Nobody is asked who they are, as the
// specification demands: it holds public keys only.
func (p *Publisher) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "the bundle can be read, and nothing else", http.StatusMethodNotAllowed)
		return
	}
	doc, sequence := p.Document()
	if doc == nil {
		http.Error(w, "there is no bundle yet", http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", fmt.Sprintf("max-age=%d", p.RefreshHint/time.Second))
	w.Header().Set("ETag", fmt.Sprintf(`"%d"`, sequence))
	_, _ = w.Write(doc) // the caller is gone
}

// Serve answers on a listener with a certificate until ctx ends. It closes the
// listener.
func Serve(ctx context.Context, l net.Listener, certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error), handler http.Handler, log *slog.Logger) error {
	server := &http.Server{
		Handler: handler, ReadHeaderTimeout: headerTime, ReadTimeout: headerTime, WriteTimeout: answerTime,
		IdleTimeout: idleTime, MaxHeaderBytes: maxHeaders,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug), // of strangers' handshakes
		TLSConfig: &tls.Config{
			// As Mozilla's intermediate recommendation, which the specification names.
			MinVersion: tls.VersionTLS12, GetCertificate: certificate,
		},
	}
	done := make(chan struct{})
	stopped := context.AfterFunc(ctx, func() {
		defer close(done)
		hurry, cancel := context.WithTimeout(context.Background(), shutdownTime)
		defer cancel()
		if server.Shutdown(hurry) != nil {
			server.Close()
		}
	})
	err := server.ServeTLS(netutil.LimitListener(l, maxConns), "", "")
	if !stopped() {
		<-done
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}
