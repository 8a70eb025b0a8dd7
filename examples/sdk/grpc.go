package main

import (
	"context"
	"fmt"
	"net"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/signet-mesh/signet/sdk"
)

// health is a service of gRPC's own, as good as any for an example.
type health struct {
	grpc_health_v1.UnimplementedHealthServer
}

// Check answers, and says on standard output who asked.
func (health) Check(ctx context.Context, _ *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	caller, _ := sdk.PeerFromContext(ctx)
	fmt.Println("hello", caller)
	return &grpc_health_v1.HealthCheckResponse{Status: grpc_health_v1.HealthCheckResponse_SERVING}, nil
}

// serveGRPC answers whom the policies let in.
func serveGRPC(ctx context.Context, m *sdk.Mesh, address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	fmt.Println(m.ID(), "listens on", l.Addr())
	server := grpc.NewServer(grpc.Creds(m.GRPCServer()))
	grpc_health_v1.RegisterHealthServer(server, health{})
	defer context.AfterFunc(ctx, server.GracefulStop)()
	return server.Serve(l)
}

// callGRPC prints what a server answers.
func callGRPC(ctx context.Context, m *sdk.Mesh, address string, server spiffeid.ID) error {
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(m.GRPCClient(server)))
	if err != nil {
		return err
	}
	defer conn.Close()
	answer, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		return err
	}
	fmt.Println(answer.GetStatus())
	return nil
}
