// Command api is the API of the example shop. It keeps carts in Redis and
// orders in PostgreSQL, and knows nothing of a mesh:
//
//	GET  /api/cart         what is in the cart
//	POST /api/cart/ITEM    puts one in
//	GET  /api/orders       the newest orders
//	POST /api/orders       orders what is in the cart
//
// gRPC's health protocol is on another port.
package main

import (
	"context"
	"database/sql"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	_ "github.com/lib/pq" // the driver of PostgreSQL
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], slog.New(slog.NewTextHandler(os.Stderr, nil)))
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "api:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, log *slog.Logger) error {
	f := flag.NewFlagSet("api", flag.ContinueOnError)
	listen := f.String("listen", ":8080", "address for HTTP")
	healthListen := f.String("health", ":9090", "address for gRPC health")
	cart := f.String("cart", "cart:6379", "address of Redis")
	if err := f.Parse(args); err != nil {
		return err
	}
	// How to reach PostgreSQL is in PGHOST, PGUSER and so on.
	db, err := sql.Open("postgres", "sslmode=disable connect_timeout=5")
	if err != nil {
		return err
	}
	defer db.Close()
	// A connection that is not needed is not kept: each one in use is in the
	// audit with a beginning and an end.
	db.SetMaxIdleConns(0)

	web, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	rpc, err := net.Listen("tcp", *healthListen)
	if err != nil {
		return errors.Join(err, web.Close())
	}
	hs := &http.Server{Handler: (&shop{cart: redis{*cart}, db: db, log: log}).routes(), ReadHeaderTimeout: 10 * time.Second}
	gs := grpc.NewServer()
	healthpb.RegisterHealthServer(gs, health.NewServer())

	failed := make(chan error, 2)
	var wait sync.WaitGroup
	wait.Go(func() { failed <- hs.Serve(web) })
	wait.Go(func() { failed <- gs.Serve(rpc) })
	log.InfoContext(ctx, "serving", "http", web.Addr().String(), "health", rpc.Addr().String())
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	soon, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	err = errors.Join(err, hs.Shutdown(soon))
	gs.Stop()
	wait.Wait()
	return err
}
