package conformance

import (
	"context"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
)

var endpointChecks = []check{
	{Check{"endpoint-open", docEndpoint, "3, 3.1, 5", Must, "gRPC, without TLS and without credentials of the caller"}, checkOpen},
	{Check{"header-missing", docEndpoint, "6", Must, "a call without the metadata workload.spiffe.io is InvalidArgument"}, checkHeaderMissing},
	{Check{"header-value", docEndpoint, "3", Must, "a call whose workload.spiffe.io is anything but true, in lower case, is refused"}, checkHeaderValue},
	{Check{"reflection", docEndpoint, "7", Should, "gRPC server reflection is offered, and names the Workload API"}, checkReflection},
	{Check{"no-method-beyond", docAPI, "2", Must, "the service has no method beyond the specification"}, checkMethods},
	{Check{"no-field-beyond", docAPI, "2", Must, "messages have no field beyond the specification"}, checkFields},
	{Check{"wit-unimplemented", docAPI, "7", Must, "without the WIT-SVID profile, its methods are Unimplemented"}, checkWIT},
}

// checkOpen wants any answer but one that says that the way there was wrong.
func checkOpen(ctx context.Context, s *session) (string, error) {
	if err := s.hasEndpoint(); err != nil {
		return "", err
	}
	_, err := s.fetchX509(ctx)
	switch code := status.Code(err); code {
	case codes.Unavailable, codes.Unauthenticated, codes.DeadlineExceeded:
		return "", fmt.Errorf("FetchX509SVID: %w", err)
	default:
		return fmt.Sprintf("FetchX509SVID is answered with %s", code), nil
	}
}

// open is nil if the endpoint answers at all; else there is nothing more to say.
func (s *session) open(ctx context.Context) error {
	if _, err := checkOpen(ctx, s); err != nil {
		if errors.Is(err, errNoEndpoint) {
			return err
		}
		return skip("the endpoint does not answer; see endpoint-open")
	}
	return nil
}

func checkHeaderMissing(ctx context.Context, s *session) (string, error) {
	if err := s.open(ctx); err != nil {
		return "", err
	}
	err := each(s.calls(), func(c call) string { return c.name }, func(c call) error {
		ctx, cancel := context.WithTimeout(ctx, s.Timeout)
		defer cancel()
		if _, err := c.do(ctx, s.conn); status.Code(err) != codes.InvalidArgument {
			return fmt.Errorf("answered with %s, want InvalidArgument", describe(err))
		}
		return nil
	})
	return fmt.Sprintf("%d methods", len(s.calls())), err
}

func checkHeaderValue(ctx context.Context, s *session) (string, error) {
	if err := s.open(ctx); err != nil {
		return "", err
	}
	values := []string{"True", "TRUE", "tRue", "false", "1", "yes", ""}
	for _, c := range s.calls() {
		err := each(values, func(v string) string { return fmt.Sprintf("%s with %q", c.name, v) }, func(v string) error {
			ctx, cancel := context.WithTimeout(ctx, s.Timeout)
			defer cancel()
			_, err := c.do(metadata.AppendToOutgoingContext(ctx, header, v), s.conn)
			return refused(err)
		})
		if err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("%d methods, %d values", len(s.calls()), len(values)), nil
}

// refused wants an error that is a verdict on the request.
func refused(err error) error {
	switch code := status.Code(err); code {
	case codes.OK:
		return errors.New("it is answered")
	case codes.Unavailable, codes.DeadlineExceeded, codes.Unimplemented, codes.Canceled:
		return fmt.Errorf("%s is no refusal", describe(err))
	}
	return nil
}

// describe says what a call ended with.
func describe(err error) string {
	if err == nil {
		return "an answer"
	}
	s := status.Convert(err)
	return fmt.Sprintf("%s (%s)", s.Code(), s.Message())
}

// checkMethods compares what reflection shows, and calls what nobody specified.
func checkMethods(ctx context.Context, s *session) (string, error) {
	if err := s.open(ctx); err != nil {
		return "", err
	}
	const prefix = "/" + serviceName + "/"
	for _, method := range []string{"FetchX509SVIDs", "FetchSVID", "FetchAll", "Attest", "fetchX509SVID"} {
		err := s.invoke(ctx, prefix+method)
		if status.Code(err) != codes.Unimplemented {
			return "", fmt.Errorf("a method %s that nobody specified is answered with %s, want Unimplemented", method, describe(err))
		}
	}
	shown, err := s.shown(ctx)
	if err != nil {
		return "unknown methods are Unimplemented; which there are is not shown by reflection", nil //nolint:nilerr // judged by checkReflection
	}
	return "as reflection shows, and unknown methods are Unimplemented", methodsBeyond(shown)
}

func (s *session) invoke(ctx context.Context, method string) error {
	ctx, cancel := s.proper(ctx)
	defer cancel()
	return s.conn.Invoke(ctx, method, &emptypb.Empty{}, &emptypb.Empty{})
}

// checkFields looks at messages as reflection shows them, and at those that came.
func checkFields(ctx context.Context, s *session) (string, error) {
	if err := s.open(ctx); err != nil {
		return "", err
	}
	for _, c := range s.calls() {
		ctx, cancel := s.proper(ctx)
		m, err := c.do(ctx, s.conn)
		cancel()
		if err != nil {
			continue // judged by others
		}
		if err := unknownFields(c.name+"'s answer", m.ProtoReflect()); err != nil {
			return "", err
		}
	}
	shown, err := s.shown(ctx)
	if err != nil {
		return "in the answers; reflection does not show the messages", nil //nolint:nilerr // judged by checkReflection
	}
	return "in the answers, and as reflection shows", fieldsBeyond(shown)
}

// checkWIT wants the optional profile as a whole, or not at all.
func checkWIT(ctx context.Context, s *session) (string, error) {
	if err := s.open(ctx); err != nil {
		return "", err
	}
	wit := []call{
		streamed("FetchWITSVID", func(c grpc.ClientConnInterface) func(context.Context) (grpc.ServerStreamingClient[workload.WITSVIDResponse], error) {
			return func(ctx context.Context) (grpc.ServerStreamingClient[workload.WITSVIDResponse], error) {
				return workload.NewSpiffeWorkloadAPIClient(c).FetchWITSVID(ctx, &workload.WITSVIDRequest{})
			}
		}, func(m *workload.WITSVIDResponse) *workload.WITSVIDResponse { return m }),
		streamed("FetchWITBundles", func(c grpc.ClientConnInterface) func(context.Context) (grpc.ServerStreamingClient[workload.WITBundlesResponse], error) {
			return func(ctx context.Context) (grpc.ServerStreamingClient[workload.WITBundlesResponse], error) {
				return workload.NewSpiffeWorkloadAPIClient(c).FetchWITBundles(ctx, &workload.WITBundlesRequest{})
			}
		}, func(m *workload.WITBundlesResponse) *workload.WITBundlesResponse { return m }),
	}
	offered := 0
	for _, c := range wit {
		ctx, cancel := s.proper(ctx)
		_, err := c.do(ctx, s.conn)
		cancel()
		switch status.Code(err) {
		case codes.OK, codes.PermissionDenied:
			offered++
		case codes.Unimplemented:
		default:
			return "", fmt.Errorf("%s is answered with %s", c.name, describe(err))
		}
	}
	switch offered {
	case 0:
		return "both are", nil
	case len(wit):
		return "", skip("the optional profile is offered; the suite does not look at it")
	}
	return "", errors.New("one of its methods is Unimplemented, and the other is not")
}

var strangerChecks = []check{
	{Check{"stranger", docEndpoint, "6", Should, "a caller without an identity is answered PermissionDenied"}, checkStranger},
}

func checkStranger(ctx context.Context, s *session) (string, error) {
	if s.stranger == nil {
		return "", skip("no endpoint is given at which the caller has no identity")
	}
	err := each(s.calls(), func(c call) string { return c.name }, func(c call) error {
		ctx, cancel := s.proper(ctx)
		defer cancel()
		m, err := c.do(ctx, s.stranger)
		if err == nil && proto.Size(m) == 0 {
			return errors.New("answered with an empty message, want PermissionDenied")
		}
		if status.Code(err) != codes.PermissionDenied {
			return fmt.Errorf("answered with %s, want PermissionDenied", describe(err))
		}
		return nil
	})
	return fmt.Sprintf("%d methods", len(s.calls())), err
}
