{{- /* What pods have in common. The argument is (dict "root" $ "values" VALUES "component" NAME ["pool" NAME]). */}}

{{- define "forebay.image" -}}
{{- with .values.image -}}
{{ .registry }}/{{ .repository }}{{ with .digest }}@{{ . }}{{ else }}:{{ .tag | default $.root.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{- define "forebay.podMetadata" -}}
labels:
  {{- include "forebay.labels" . | nindent 2 }}
  {{- with .values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- $annotations := merge (dict) (default dict .annotations) .values.podAnnotations }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* Who runs it and where. Spreading is wanted, not required: one node is better than none. */}}
{{- define "forebay.podSpec" -}}
securityContext:
  runAsNonRoot: true
  {{- if kindIs "invalid" .root.Values.runAsUser | not }}
  runAsUser: {{ int64 .root.Values.runAsUser }}
  runAsGroup: {{ int64 .root.Values.runAsUser }}
  {{- end }}
  seccompProfile: {type: RuntimeDefault}
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
{{- if .values.topologySpreadConstraints }}
{{- toYaml .values.topologySpreadConstraints | nindent 0 }}
{{- else }}
{{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
- maxSkew: 1
  topologyKey: {{ . }}
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels:
      {{- include "forebay.selector" $ | nindent 6 }}
  matchLabelKeys: [pod-template-hash]
{{- end }}
{{- end }}
{{- end }}

{{- define "forebay.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{- /* An eviction never takes more than one, and with a single replica it takes that one: a budget
that forbids it would keep nodes from being drained. */}}
{{- define "forebay.disruption" -}}
maxUnavailable: 1
selector:
  matchLabels:
    {{- include "forebay.selector" . | nindent 4 }}
{{- end }}
