package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	pb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
)

// rpcClient is a gRPC client in the cluster with one connection.
func (r *requests) rpcClient(t *testing.T) (pb.TestServiceClient, *atomic.Int32) {
	t.Helper()
	var dials atomic.Int32
	c, err := grpc.NewClient("passthrough:///"+r.grpc, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
		dials.Add(1)
		return r.dial(ctx, "tcp", addr)
	}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return pb.NewTestServiceClient(c), &dials
}

// as says whose call it is, in its metadata.
func as(ctx context.Context, user string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "x-user", user)
}

// fromWhom compares a call's header with the user's server.
func fromWhom(md metadata.MD, user string) error {
	if got := fmt.Sprint(md["x-name"]); got != "["+nameOf(user)+"]" {
		return fmt.Errorf("answered by %s", got)
	}
	return nil
}

var rpcRows = map[string]func(ctx context.Context, c pb.TestServiceClient, user string) error{
	"unary": unary, "server stream": serverStream, "client stream": clientStream, "both": bothStreams, "error": rpcError, "unknown": unknown,
	"deadline": deadline, "cancel": cancelled,
}

// gRPC has calls of all kinds, of two users and of nobody, share a connection.
func (r *requests) gRPC(t *testing.T) {
	c, dials := r.rpcClient(t)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	for name, row := range rpcRows {
		for i := range 6 {
			user := []string{other, "lou", ""}[i%3]
			wg.Go(func() {
				if err := row(as(ctx, user), c, user); err != nil {
					t.Errorf("%s of %q: %v", name, user, err)
				}
			})
		}
	}
	wg.Wait()
	if n := dials.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

func unary(ctx context.Context, c pb.TestServiceClient, user string) error {
	for _, n := range []int{0, 10, 3 << 20} {
		var header, trailer metadata.MD
		body := bytes.Repeat([]byte{byte(n)}, n)
		got, err := c.UnaryCall(ctx, &pb.SimpleRequest{Payload: &pb.Payload{Body: body}}, grpc.Header(&header), grpc.Trailer(&trailer))
		if err != nil {
			return err
		}
		if !bytes.Equal(got.GetPayload().GetBody(), body) || got.GetServerId() != nameOf(user) || fmt.Sprint(trailer["x-trailer"]) != "["+nameOf(user)+"]" {
			return fmt.Errorf("%d bytes of %d from %q, trailer %v", len(got.GetPayload().GetBody()), n, got.GetServerId(), trailer)
		}
		if err := fromWhom(header, user); err != nil {
			return err
		}
	}
	return nil
}

func serverStream(ctx context.Context, c pb.TestServiceClient, user string) error {
	var ask pb.StreamingOutputCallRequest
	for n := range int32(40) {
		ask.ResponseParameters = append(ask.ResponseParameters, &pb.ResponseParameters{Size: n * n * 60})
	}
	s, err := c.StreamingOutputCall(ctx, &ask)
	if err != nil {
		return err
	}
	for _, p := range ask.GetResponseParameters() {
		m, err := s.Recv()
		if err != nil {
			return err
		}
		if got := len(m.GetPayload().GetBody()); got != int(p.GetSize()) {
			return fmt.Errorf("%d bytes, not %d", got, p.GetSize())
		}
	}
	if m, err := s.Recv(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("after the last %v, %w", m, err)
	}
	md, err := s.Header()
	return errors.Join(err, fromWhom(md, user))
}

func clientStream(ctx context.Context, c pb.TestServiceClient, user string) error {
	s, err := c.StreamingInputCall(ctx)
	if err != nil {
		return err
	}
	sum := int32(0)
	for n := range int32(40) {
		sum += n * n * 60
		if err := s.Send(&pb.StreamingInputCallRequest{Payload: &pb.Payload{Body: make([]byte, n*n*60)}}); err != nil {
			return err
		}
	}
	m, err := s.CloseAndRecv()
	if err != nil || m.GetAggregatedPayloadSize() != sum {
		return fmt.Errorf("%d of %d bytes came, %w", m.GetAggregatedPayloadSize(), sum, err)
	}
	md, err := s.Header()
	return errors.Join(err, fromWhom(md, user))
}

func bothStreams(ctx context.Context, c pb.TestServiceClient, user string) error {
	s, err := c.FullDuplexCall(ctx)
	if err != nil {
		return err
	}
	for n := range 40 {
		body := bytes.Repeat([]byte{byte(n)}, n*n*60)
		if err := s.Send(&pb.StreamingOutputCallRequest{Payload: &pb.Payload{Body: body}}); err != nil {
			return err
		}
		m, err := s.Recv()
		if err != nil || !bytes.Equal(m.GetPayload().GetBody(), body) {
			return fmt.Errorf("message %d: %d bytes came back, %w", n, len(m.GetPayload().GetBody()), err)
		}
	}
	md, err := s.Header()
	if err := errors.Join(err, s.CloseSend(), fromWhom(md, user)); err != nil {
		return err
	}
	if _, err := s.Recv(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("after the last %w", err)
	}
	return nil
}

// rpcError is a status with a message that needs escapes, and details.
func rpcError(ctx context.Context, c pb.TestServiceClient, user string) error {
	const msg = "\t\ntest with whitespace\r\nand Unicode BMP \u263a and non-BMP \U0001f608\t\n"
	_, err := c.UnaryCall(ctx, &pb.SimpleRequest{ResponseStatus: &pb.EchoStatus{Code: int32(codes.FailedPrecondition), Message: msg}})
	st := status.Convert(err)
	if st.Code() != codes.FailedPrecondition || st.Message() != msg || len(st.Details()) != 1 {
		return fmt.Errorf("with %v: %w", st.Details(), err)
	}
	if p, ok := st.Details()[0].(*pb.Payload); !ok || string(p.GetBody()) != "details of "+nameOf(user) {
		return fmt.Errorf("details %v", st.Details())
	}
	return nil
}

func unknown(ctx context.Context, c pb.TestServiceClient, _ string) error {
	_, err := c.UnimplementedCall(ctx, &pb.Empty{})
	return wantCode(err, codes.Unimplemented)
}

func deadline(ctx context.Context, c pb.TestServiceClient, user string) error {
	ctx, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	_, err := c.UnaryCall(ctx, &pb.SimpleRequest{ResponseStatus: &pb.EchoStatus{Code: int32(codes.DeadlineExceeded)}})
	return wantCode(err, codes.DeadlineExceeded)
}

func cancelled(ctx context.Context, c pb.TestServiceClient, user string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := c.FullDuplexCall(ctx)
	if err != nil {
		return err
	}
	md, err := s.Header()
	if err := errors.Join(err, fromWhom(md, user)); err != nil {
		return err
	}
	cancel()
	_, err = s.Recv()
	return wantCode(err, codes.Canceled)
}

func wantCode(err error, want codes.Code) error {
	if got := status.Code(err); got != want {
		return fmt.Errorf("%v, want %v: %w", got, want, err)
	}
	return nil
}

// grpcurl is a client of others; it is told the service's types by a file.
func (r *requests) grpcurl(t *testing.T) {
	var set descriptorpb.FileDescriptorSet
	for _, f := range []protoreflect.FileDescriptor{pb.File_grpc_testing_empty_proto, pb.File_grpc_testing_messages_proto, pb.File_grpc_testing_test_proto} {
		set.File = append(set.File, protodesc.ToFileDescriptorProto(f))
	}
	types := filepath.Join(t.TempDir(), "types")
	b, err := proto.Marshal(&set)
	if err == nil {
		err = os.WriteFile(types, b, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, user := range []string{other, "lou"} {
		out, err := r.c.lab("node", "exec", "--", filepath.Join(r.c.root, "bin/tools/grpcurl-v1.9.3"), "-plaintext", "-protoset", types, "-H", "x-user: "+user, "-d", `{"payload":{"body":"aGVsbG8="}}`, r.grpc, "grpc.testing.TestService/UnaryCall")
		var answer struct {
			ServerID string `json:"serverId"`
			Payload  struct{ Body string }
		}
		if err == nil {
			err = json.Unmarshal([]byte(out), &answer)
		}
		if err != nil || answer.ServerID != nameOf(user) || answer.Payload.Body != "aGVsbG8=" {
			t.Errorf("%s: %v\n%s", user, err, out)
		}
	}
}
