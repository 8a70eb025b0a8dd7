package conformance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	reflection "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
)

const serviceName = "SpiffeWorkloadAPI"

// specified is the file of the specification.
var specified = (*workload.X509SVIDRequest)(nil).ProtoReflect().Descriptor().ParentFile()

func checkReflection(ctx context.Context, s *session) (string, error) {
	if err := s.open(ctx); err != nil {
		return "", err
	}
	names, _, err := s.reflect(ctx)
	if err != nil {
		return "", err
	}
	if !slices.Contains(names, serviceName) {
		return "", fmt.Errorf("it names %q, and not %s", names, serviceName)
	}
	return fmt.Sprintf("it names %q", names), nil
}

// shown returns what reflection says of the file that has the service.
func (s *session) shown(ctx context.Context) (*descriptorpb.FileDescriptorProto, error) {
	_, file, err := s.reflect(ctx)
	return file, err
}

// reflect asks for the services, and the file that has the Workload API, by the
// newer version of the protocol or by the older.
func (s *session) reflect(ctx context.Context) (names []string, file *descriptorpb.FileDescriptorProto, err error) {
	for _, version := range []string{"v1", "v1alpha"} {
		if names, file, err = s.reflectWith(ctx, version); err == nil {
			break
		}
	}
	return names, file, err
}

// reflectWith asks two questions. Both versions of the protocol are the same on the
// wire but for the name of the service.
func (s *session) reflectWith(ctx context.Context, version string) (names []string, file *descriptorpb.FileDescriptorProto, err error) {
	ctx, cancel := s.proper(ctx)
	defer cancel()
	stream, err := s.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/grpc.reflection."+version+".ServerReflection/ServerReflectionInfo")
	if err != nil {
		return nil, nil, fmt.Errorf("reflection: %w", err)
	}
	ask := func(r *reflection.ServerReflectionRequest) (*reflection.ServerReflectionResponse, error) {
		if err := stream.SendMsg(r); err != nil && !errors.Is(err, io.EOF) { // EOF: the answer says why
			return nil, fmt.Errorf("reflection: %w", err)
		}
		answer := &reflection.ServerReflectionResponse{}
		if err := stream.RecvMsg(answer); err != nil {
			return nil, fmt.Errorf("reflection: %w", err)
		}
		return answer, nil
	}
	answer, err := ask(&reflection.ServerReflectionRequest{MessageRequest: &reflection.ServerReflectionRequest_ListServices{}})
	if err != nil {
		return nil, nil, err
	}
	for _, service := range answer.GetListServicesResponse().GetService() {
		names = append(names, service.GetName())
	}
	slices.Sort(names)
	answer, err = ask(&reflection.ServerReflectionRequest{MessageRequest: &reflection.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: serviceName}})
	if err != nil {
		return names, nil, err
	}
	for _, raw := range answer.GetFileDescriptorResponse().GetFileDescriptorProto() {
		f := &descriptorpb.FileDescriptorProto{}
		if err := proto.Unmarshal(raw, f); err != nil {
			return names, nil, fmt.Errorf("reflection: %w", err)
		}
		if f.GetPackage() == "" && slices.ContainsFunc(f.GetService(), func(s *descriptorpb.ServiceDescriptorProto) bool { return s.GetName() == serviceName }) {
			file = f
		}
	}
	if file == nil {
		return names, nil, fmt.Errorf("reflection: no file has %s: %s", serviceName, answer.GetErrorResponse().GetErrorMessage())
	}
	return names, file, nil
}

// methodsBeyond names what the service has and the specification has not, or has
// in another form.
func methodsBeyond(file *descriptorpb.FileDescriptorProto) error {
	want := specified.Services().ByName(serviceName)
	for _, service := range file.GetService() {
		if service.GetName() != serviceName {
			continue
		}
		for _, m := range service.GetMethod() {
			spec := want.Methods().ByName(protoreflect.Name(m.GetName()))
			switch {
			case spec == nil:
				return fmt.Errorf("the service has a method %s", m.GetName())
			case m.GetInputType() != "."+string(spec.Input().FullName()), m.GetOutputType() != "."+string(spec.Output().FullName()),
				m.GetServerStreaming() != spec.IsStreamingServer(), m.GetClientStreaming() != spec.IsStreamingClient():
				return fmt.Errorf("the method %s takes and returns something else than is specified", m.GetName())
			}
		}
	}
	return nil
}

// fieldsBeyond names what a message has and the specification has not, or has in
// another form.
func fieldsBeyond(file *descriptorpb.FileDescriptorProto) error {
	for _, m := range file.GetMessageType() {
		spec := specified.Messages().ByName(protoreflect.Name(m.GetName()))
		if spec == nil {
			continue // used by no method that is specified, or methodsBeyond says so
		}
		for _, f := range m.GetField() {
			want := spec.Fields().ByNumber(protoreflect.FieldNumber(f.GetNumber()))
			switch {
			case want == nil:
				return fmt.Errorf("%s has a field %s", m.GetName(), f.GetName())
			case string(want.Name()) != f.GetName(), int(want.Kind()) != int(f.GetType()), (f.GetLabel() == descriptorpb.FieldDescriptorProto_LABEL_REPEATED) != (want.Cardinality() == protoreflect.Repeated):
				return fmt.Errorf("%s has a field %d that is not %s as specified", m.GetName(), f.GetNumber(), want.Name())
			}
		}
	}
	return nil
}

// unknownFields names a message that came with more than the specification has.
func unknownFields(name string, m protoreflect.Message) (err error) {
	if n := len(m.GetUnknown()); n > 0 {
		return fmt.Errorf("%s: %d bytes of unknown fields", name, n)
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if f.Kind() != protoreflect.MessageKind || !f.IsList() {
			return true
		}
		for i := range v.List().Len() {
			if err = unknownFields(name+", "+string(f.Name()), v.List().Get(i).Message()); err != nil {
				return false
			}
		}
		return true
	})
	return err
}
