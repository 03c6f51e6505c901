{{- define "doppel.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: doppel
app.kubernetes.io/version: {{ .Chart.AppVersion | replace "+" "_" | trunc 63 | quote }}
{{ include "doppel.selector" . }}
{{- end }}

{{- define "doppel.selector" -}}
app.kubernetes.io/name: traffic-manager
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- /* The image tag: build metadata ("+abc") is legal in a version and not in a tag. */ -}}
{{- define "doppel.tag" -}}
{{ default (.Chart.AppVersion | replace "+" "_") .Values.image.tag }}
{{- end }}

{{- define "doppel.agentImage" -}}
{{ default (printf "%s/traffic-agent:%s" .Values.image.registry (include "doppel.tag" .)) .Values.agent.image }}
{{- end }}

{{- /* The name under which the API server knows the manager. */ -}}
{{- define "doppel.managerUser" -}}
system:serviceaccount:{{ .Release.Namespace }}:traffic-manager
{{- end }}

{{- /* clientRbac.subjects with the API group that users and groups need. */ -}}
{{- define "doppel.subjects" -}}
{{- range .Values.clientRbac.subjects }}
- kind: {{ .kind }}
  name: {{ .name | quote }}
  {{- if eq .kind "ServiceAccount" }}
  namespace: {{ .namespace | quote }}
  {{- else }}
  apiGroup: {{ .apiGroup | default "rbac.authorization.k8s.io" }}
  {{- end }}
{{- end }}
{{- end }}
