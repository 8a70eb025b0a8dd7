package csi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"time"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/signet-mesh/signet/agent/refusal"
	"github.com/signet-mesh/signet/internal/unixsocket"
)

// socket is where kubelet asks for volumes.
func (d *Driver) socket() string {
	return filepath.Join(d.cfg.Kubelet, "plugins", Name, "csi.sock")
}

// registrar is where kubelet, which looks into that directory, finds the driver.
func (d *Driver) registrar() string {
	return filepath.Join(d.cfg.Kubelet, "plugins_registry", Name+"-reg.sock")
}

// Run keeps the volumes that there are, and serves kubelet, until ctx ends. What is
// mounted then stays.
func (d *Driver) Run(ctx context.Context) error {
	if err := d.restore(); err != nil {
		return fmt.Errorf("csi: %w", err)
	}
	server, registrar := grpc.NewServer(grpc.UnaryInterceptor(d.log)), grpc.NewServer()
	spec.RegisterIdentityServer(server, identityServer{d: d})
	spec.RegisterNodeServer(server, nodeServer{d: d})
	registration.RegisterRegistrationServer(registrar, registrationServer{d: d})
	volumes, err := unixsocket.Listen(d.socket(), 0o600)
	if err != nil {
		return fmt.Errorf("csi: %w", err)
	}
	plugins, err := unixsocket.Listen(d.registrar(), 0o600) // last: kubelet calls at once
	if err != nil {
		volumes.Close()
		return fmt.Errorf("csi: %w", err)
	}
	g, ctx := errgroup.WithContext(ctx)
	serve := func(s *grpc.Server, l net.Listener) {
		g.Go(func() error {
			if err := s.Serve(l); err != nil && ctx.Err() == nil {
				return fmt.Errorf("csi: serve %s: %w", l.Addr(), err)
			}
			return nil
		})
		g.Go(func() error { <-ctx.Done(); s.Stop(); return nil })
	}
	serve(server, volumes)
	serve(registrar, plugins)
	g.Go(func() error { d.follow(ctx); return nil })
	return g.Wait()
}

// log says what kubelet was answered.
func (d *Driver) log(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	began := time.Now()
	resp, err := handler(ctx, req)
	if err != nil {
		attrs := []slog.Attr{slog.String("method", info.FullMethod[strings.LastIndexByte(info.FullMethod, '/')+1:]), slog.Any("error", err), slog.Duration("took", time.Since(began))}
		if v, ok := req.(interface{ GetVolumeId() string }); ok {
			attrs = append(attrs, slog.String("volume", v.GetVolumeId()))
		}
		d.cfg.Log.LogAttrs(ctx, slog.LevelWarn, "kubelet's request was refused", attrs...)
	}
	return resp, err
}

// registrationServer tells kubelet where the driver is.
type registrationServer struct {
	registration.UnimplementedRegistrationServer
	d *Driver
}

// GetInfo implements registration.RegistrationServer.
func (s registrationServer) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{Type: registration.CSIPlugin, Name: Name, Endpoint: s.d.socket(), SupportedVersions: []string{"1.0.0"}}, nil
}

// NotifyRegistrationStatus implements registration.RegistrationServer.
func (s registrationServer) NotifyRegistrationStatus(_ context.Context, r *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	if r.GetPluginRegistered() {
		s.d.cfg.Log.Info("kubelet knows the driver of volumes", "driver", Name)
	} else {
		s.d.cfg.Log.Error("kubelet refused the driver of volumes; it tries again", "driver", Name, "error", r.GetError())
	}
	return &registration.RegistrationStatusResponse{}, nil
}

// identityServer says what the driver is.
type identityServer struct {
	spec.UnimplementedIdentityServer
	d *Driver
}

// GetPluginInfo implements spec.IdentityServer.
func (s identityServer) GetPluginInfo(context.Context, *spec.GetPluginInfoRequest) (*spec.GetPluginInfoResponse, error) {
	return &spec.GetPluginInfoResponse{Name: Name, VendorVersion: s.d.cfg.Version}, nil
}

// GetPluginCapabilities implements spec.IdentityServer: there is no controller.
func (s identityServer) GetPluginCapabilities(context.Context, *spec.GetPluginCapabilitiesRequest) (*spec.GetPluginCapabilitiesResponse, error) {
	return &spec.GetPluginCapabilitiesResponse{}, nil
}

// Probe implements spec.IdentityServer.
func (s identityServer) Probe(context.Context, *spec.ProbeRequest) (*spec.ProbeResponse, error) {
	return &spec.ProbeResponse{Ready: wrapperspb.Bool(true)}, nil
}

// nodeServer mounts volumes for kubelet.
type nodeServer struct {
	spec.UnimplementedNodeServer
	d *Driver
}

// NodeGetInfo implements spec.NodeServer.
func (s nodeServer) NodeGetInfo(context.Context, *spec.NodeGetInfoRequest) (*spec.NodeGetInfoResponse, error) {
	return &spec.NodeGetInfoResponse{NodeId: s.d.cfg.Node}, nil
}

// NodeGetCapabilities implements spec.NodeServer: kubelet hands a pod's fsGroup on
// and changes no owner itself.
func (s nodeServer) NodeGetCapabilities(context.Context, *spec.NodeGetCapabilitiesRequest) (*spec.NodeGetCapabilitiesResponse, error) {
	return &spec.NodeGetCapabilitiesResponse{Capabilities: []*spec.NodeServiceCapability{{
		Type: &spec.NodeServiceCapability_Rpc{Rpc: &spec.NodeServiceCapability_RPC{Type: spec.NodeServiceCapability_RPC_VOLUME_MOUNT_GROUP}},
	}}}, nil
}

// NodePublishVolume implements spec.NodeServer.
func (s nodeServer) NodePublishVolume(ctx context.Context, req *spec.NodePublishVolumeRequest) (*spec.NodePublishVolumeResponse, error) {
	v, err := parse(req, s.d.pods())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if err := s.d.publish(ctx, v); err != nil {
		var refused *refusedError
		if errors.As(err, &refused) && s.d.cfg.Refused != nil {
			s.d.cfg.Refused(refusal.Refusal{Kind: refused.kind, Call: "NodePublishVolume", Reason: err.Error(), Caller: refusal.Caller{PodUID: v.UID}})
		}
		code := codes.FailedPrecondition
		if errors.Is(err, ErrUnknown) || errors.Is(err, errPending) {
			code = codes.Unavailable
		}
		return nil, status.Error(code, err.Error())
	}
	return &spec.NodePublishVolumeResponse{}, nil
}

// NodeUnpublishVolume implements spec.NodeServer.
func (s nodeServer) NodeUnpublishVolume(_ context.Context, req *spec.NodeUnpublishVolumeRequest) (*spec.NodeUnpublishVolumeResponse, error) {
	if !volumeID.MatchString(req.GetVolumeId()) {
		return nil, status.Errorf(codes.InvalidArgument, "volume_id %q is none of kubelet's", req.GetVolumeId())
	}
	if err := s.d.unpublish(req.GetVolumeId(), req.GetTargetPath()); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &spec.NodeUnpublishVolumeResponse{}, nil
}
