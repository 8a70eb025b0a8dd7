package workloadapi

import (
	"slices"
	"testing"

	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"
)

// The service has the methods of the specification and no other; what else there
// is to offer is a service of its own.
func TestMethods(t *testing.T) {
	a := startAgent(t, nil)
	s, err := reflectionpb.NewServerReflectionClient(a.dial()).ServerReflectionInfo(call(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "SpiffeWorkloadAPI"}}); err != nil {
		t.Fatal(err)
	}
	m, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var methods []string
	for _, raw := range m.GetFileDescriptorResponse().GetFileDescriptorProto() {
		var file descriptorpb.FileDescriptorProto
		if err := proto.Unmarshal(raw, &file); err != nil {
			t.Fatal(err)
		}
		for _, service := range file.GetService() {
			for _, method := range service.GetMethod() {
				methods = append(methods, method.GetName())
			}
		}
	}
	slices.Sort(methods)
	want := []string{"FetchJWTBundles", "FetchJWTSVID", "FetchWITBundles", "FetchWITSVID", "FetchX509Bundles", "FetchX509SVID", "ValidateJWTSVID"}
	if !slices.Equal(methods, want) {
		t.Errorf("methods %v, want %v", methods, want)
	}
}

// Programs find out what the socket speaks; that needs no header.
func TestReflection(t *testing.T) {
	a := startAgent(t, nil)
	s, err := reflectionpb.NewServerReflectionClient(a.dial()).ServerReflectionInfo(call(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	m, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, svc := range m.GetListServicesResponse().GetService() {
		names = append(names, svc.Name)
	}
	if !slices.Contains(names, "SpiffeWorkloadAPI") {
		t.Errorf("services %v", names)
	}
}
