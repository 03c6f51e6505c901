package localapi

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"
)

// FuzzCall: a request is understood whole, or refused before anything is done.
func FuzzCall(f *testing.F) {
	for _, r := range []any{ConnectRequest{}, InterceptRequest{Name: "web", Ports: []string{"3000:http"}}, LeaveRequest{Name: "web"}} {
		b, err := json.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"name":"web","nmae":"x"}`))
	f.Add([]byte(`{"name":`))
	f.Fuzz(func(t *testing.T, body []byte) {
		asked := false
		h := Handle(func(_ context.Context, r InterceptRequest, _ Progress) (InterceptRequest, error) {
			asked = true
			return r, nil
		})
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/v1/intercept", bytes.NewReader(body)))
		if (w.Code == http.StatusOK) != asked {
			t.Fatalf("%d, asked: %v", w.Code, asked)
		}
		if !asked {
			return
		}
		var back InterceptRequest
		if err := readEvents(w.Body, &back, nil); err != nil {
			t.Errorf("%s: %v", body, err)
		}
	})
}

// FuzzEvents: whatever a daemon answers, the client ends with a result or an error.
func FuzzEvents(f *testing.F) {
	f.Add([]byte("{\"progress\":\"a\"}\n{\"result\":{}}\n"))
	f.Add([]byte(`{"error":{"kind":"denied","msg":"no","hint":"ask"}}`))
	f.Add([]byte(`{"error":{"kind":5}}`))
	f.Add([]byte(`{}{}{"result":null}`))
	f.Fuzz(func(_ *testing.T, text []byte) {
		var out InterceptRequest
		if err := readEvents(bytes.NewReader(text), &out, func(string) {}); err != nil {
			_ = err.Error()
		}
	})
}
